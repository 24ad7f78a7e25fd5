"""Whether a dead job is restarted: only while restarts make progress.

    before = read_standing(run_dir)
    code = ...                                   one start of the job, to its end
    verdict = judge(code, before=before, after=read_standing(run_dir), attempts=attempts, max_restarts=3)
    if verdict.restart: attempts = verdict.attempts, and once more

A killed worker, a lost node, a hung rank: the next start continues from the newest checkpoint. A failure that always
repeats must not be retried for ever, so restarts without a new checkpoint between them are counted. Pure and
torch-free, for every supervisor: on this machine, or inside a cluster's allocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_of
from trainer.process.status import read_status

NEVER_AGAIN = {
    EXIT_FINISHED: "the run is finished",
    EXIT_STOPPED: "the run was asked to stop, and has saved",
    EXIT_BAD_CONFIG: "the configuration has to be mended first",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """State of a run. step: of its newest checkpoint, 0 without one. status: content of status.json."""

    step: int
    status: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """State between verdicts. in_vain: restarts since the last new checkpoint. step: of the furthest checkpoint seen;
    replacing a damaged one is no progress."""

    in_vain: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """reason: one line: why the job ended and the decision. attempts: for the next verdict."""

    restart: bool
    reason: str
    attempts: Attempts


def read_standing(run_dir: Path) -> Standing:
    """Look into a run folder, which need not exist yet."""
    checkpoints = committed(run_dir / CHECKPOINTS)
    return Standing(step=(step_of(checkpoints[-1]) or 0) if checkpoints else 0, status=read_status(run_dir))


def judge(code: int, *, before: Standing, after: Standing, attempts: Attempts, max_restarts: int) -> Decision:
    """Whether to restart a job that ended with this exit code.

    before, after: state of the run folder at the job's start and after its end.
    max_restarts: maximum number of restarts without a new checkpoint between them (`launcher.max_restarts`).
    A launcher's exit code says little: a rank's status file has priority.
    """
    word = after.status if after.status != before.status else {}
    reported = word.get("exit_code")
    code = reported if isinstance(reported, int) and code != EXIT_FINISHED else code
    why = str(word.get("reason") or f"exit code {code}, and no rank left word why")
    furthest = max(attempts.step, before.step)
    in_vain = 0 if after.step > furthest else attempts.in_vain
    now = Attempts(in_vain=in_vain, step=max(furthest, after.step))
    if code in NEVER_AGAIN:
        return Decision(restart=False, reason=NEVER_AGAIN[code], attempts=now)
    if word.get("retry") is False:
        return Decision(restart=False, reason=f"{why}; it would end the same way again", attempts=now)
    place = f"step {after.step}" if after.step else "the beginning"
    if in_vain >= max_restarts:
        gave_up = f"given up after {in_vain} restarts in a row from {place} (launcher.max_restarts={max_restarts})"
        return Decision(restart=False, reason=f"{why}; {gave_up}" if max_restarts else why, attempts=now)
    goes_on = f"starting again from {place} (restart {in_vain + 1} of {max_restarts} from there)"
    return Decision(restart=True, reason=f"{why}; {goes_on}", attempts=Attempts(in_vain=in_vain + 1, step=now.step))
