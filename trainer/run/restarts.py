"""Whether a job that died is started again: only while starting again gets it further.

    before = stand(run_dir)
    code = ...                                   one start of the job, to its end
    verdict = judge(code, before=before, after=stand(run_dir), attempts=attempts, max_restarts=3)
    if verdict.restart: attempts = verdict.attempts, and once more

A worker that was killed, a node that was lost, a rank that hung: the next start goes on from the newest checkpoint.
What ends the same way each time must not be tried for ever, so restarts without a new checkpoint between them are
counted. Pure and torch-free, for whoever starts jobs: on this machine, or inside an allocation of a cluster.
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
    """How a run stands. step: of its newest checkpoint, 0 without one. status: what status.json says."""

    step: int
    status: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempts:
    """What is remembered from one verdict to the next. in_vain: restarts since the last new checkpoint. step: of the
    furthest checkpoint that was seen; a damaged one that is passed over and made again is no progress."""

    in_vain: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """reason: one line, why the job ended and what is done about it. attempts: for the next verdict."""

    restart: bool
    reason: str
    attempts: Attempts


def stand(run_dir: Path) -> Standing:
    """Look into a run folder, which need not exist yet."""
    checkpoints = committed(run_dir / CHECKPOINTS)
    return Standing(step=(step_of(checkpoints[-1]) or 0) if checkpoints else 0, status=read_status(run_dir))


def judge(code: int, *, before: Standing, after: Standing, attempts: Attempts, max_restarts: int) -> Decision:
    """Whether to start a job again that ended with this exit code.

    before, after: the run folder at the job's start and after its end. max_restarts: how many may follow each other
    without a new checkpoint between them (`launcher.max_restarts`). A launcher's exit code says little: where a rank
    left word in its status file, that word counts.
    """
    word = after.status if after.status != before.status else {}
    told = word.get("exit_code")
    code = told if isinstance(told, int) and code != EXIT_FINISHED else code
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
