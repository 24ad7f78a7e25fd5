"""The errors that a user can cause, as a tree.

CookbookError
|-- ConfigError     the overrides: a misspelt key, a wrong type, an unknown choice
|-- PlanError       the meaning: degrees, batch, offload, precision that do not fit together
|-- TrainingFailed  the run: a loss or gradient that is not finite; the exit code is `EXIT_FAILED`
|   |-- RankStuck          a rank that no longer moves, reported by one that waited for it
|   |-- OutOfMemory        a rank whose GPU or host has no room for what it needs
|   |-- OutputFailed       a file of the run that could not be written: no space, no inodes, no permission
|   |-- CheckpointFailed   a checkpoint that could not be written, likewise
|   `-- CheckpointDamaged  a checkpoint whose files are not what was written
|-- CheckpointMismatch     a checkpoint of another model, tokenizer, data or format
|-- DataError       the input: a missing, empty or broken file, a tokenizer that does not fit the model
|-- RunFinished     nothing is wrong: the run in this folder is through; the exit code is `EXIT_FINISHED`
`-- EnvironmentProblem   the machine: a library, a device, a folder that is missing or not writable
    `-- RankProblem      the same, on one rank alone

Every entry point prints such an error as plain lines, without a traceback, and exits with its `exit_code`.
"""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 75
"""The run was asked to stop, has saved, and the same command continues it (EX_TEMPFAIL of sysexits.h)."""


class CookbookError(Exception):
    """Something the user can mend: `problems` holds one line for each thing that is wrong."""

    exit_code = EXIT_BAD_CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(CookbookError):
    """A key, a type or a choice that the configuration does not know."""


class PlanError(CookbookError):
    """Values that are each fine but cannot be trained together."""


class DataError(CookbookError):
    """Input data or a tokenizer that cannot be used."""


class TrainingFailed(CookbookError):
    """The run itself failed, although its configuration is valid."""

    exit_code = EXIT_FAILED


class OutputFailed(TrainingFailed):
    """Metrics, summary, profile or the finished model could not be written. Starting again would end the same way."""


class CheckpointFailed(TrainingFailed):
    """A checkpoint that could not be written."""


class CheckpointDamaged(TrainingFailed):
    """A checkpoint that was changed after it was committed: each problem names file, expected and found."""


class CheckpointMismatch(CookbookError):
    """A checkpoint that is whole but belongs to another run: each problem names the difference."""


class RunFinished(CookbookError):
    """The run of this folder is through, and the same command finds nothing left to do."""

    exit_code = EXIT_FINISHED


class EnvironmentProblem(CookbookError):
    """A library, device or folder that this run needs and this machine does not offer."""


class RankStuck(TrainingFailed):
    """A rank no longer moves, and the others wait for it."""


class OutOfMemory(TrainingFailed):
    """A rank could not allocate memory, and reports it itself. A restart would fail in the same way."""


class RankProblem(EnvironmentProblem):
    """A problem that only this rank of the node has, so it must report the problem itself."""


def first_line(error: BaseException) -> str:
    """A library's exception, shortened to one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text.rstrip(".:;, ")[:300]
