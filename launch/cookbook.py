"""`cookbook`: every entry point under one command, from any folder.

    cookbook train OVERRIDES      as python -m trainer
    cookbook launch OVERRIDES     as python -m launch

`python -m` searches the working directory first: it would run a file `trainer.py` or a folder `launch` there instead of
this project. A console command does not, and neither do the processes that it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from configs.entry_point import print_problems, version
from configs.errors import EXIT_FINISHED, ConfigError
from configs.output import delivered, guard_output

# The module whose `main` runs; arguments that precede the user's; purpose.
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "train": ("trainer.__main__", (), "train in this process"),
    "launch": ("launch.__main__", (), "start the ranks of a run on this machine, or submit it to a cluster"),
    "estimate": ("launch.estimate", (), "predict the memory of a run; the same as memory-estimate"),
    "import": ("launch.importing", (), "translate the configuration of another trainer"),
    "compare": ("launch.__main__", ("compare",), "run several layouts and write one page about them"),
    "report": ("launch.report", (), "one page about a run, and its loss curve"),
    "generate": ("launch.generate", (), "let the model of a run write"),
    "checkpoint": ("trainer.checkpoint.__main__", (), "list, verify, export, convert checkpoints"),
    "doctor": ("launch.doctor.__main__", (), "what this machine offers, and what each layout lacks here"),
    "completion": ("launch.completion", (), "completion for bash, zsh or fish"),
    "status": ("launch.__main__", ("status",), "how a submitted run stands"),
    "cancel": ("launch.__main__", ("cancel",), "cancel a submitted run"),
}
USAGE = "\n".join(
    [
        "cookbook COMMAND ...",
        "",
        *(f"  {name:<11}{purpose}" for name, (_, _, purpose) in COMMANDS.items()),
        "",
        "cookbook COMMAND --help says more; cookbook --version prints the versions.",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the entry point that the first argument names. Returns its exit code."""
    guard_output()
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return delivered(EXIT_FINISHED)
    if arguments[0] == "--version":
        print(version())
        return delivered(EXIT_FINISHED)
    if arguments[0] not in COMMANDS:
        return print_problems(
            ConfigError(
                f"cookbook {arguments[0]}: no such command; there are {', '.join(COMMANDS)}; see cookbook --help"
            )
        )
    module, before, _ = COMMANDS[arguments[0]]
    return import_module(module).main([*before, *arguments[1:]])


if __name__ == "__main__":
    sys.exit(main())
