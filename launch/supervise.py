"""Runs a job to its end, and restarts all of it from its newest checkpoint when a worker died.

The remaining ranks cannot continue without a lost one, and a launcher's own restarts (`--max-restarts`) leave it to
them to notice. So every process of the job is ended first, and the same command starts again on a new port, as long as
`trainer.run.restarts` finds progress. Next: `process`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED
from launch.command import Command
from launch.process import Forwarding, Outcome, run_command
from trainer.process.status import RUNNING, read_status, report_death
from trainer.run.restarts import Attempts, Standing, judge, read_standing

# Time for the system to reclaim ports and GPU memory.
PAUSE_SECONDS = 2.0
CUT_OFF = "ended by a signal before it had saved; the same command goes on from its newest checkpoint"


def run_job(build: Callable[[bool], Command], run_dir: Path, *, max_restarts: int) -> tuple[int, bool]:
    """`keep_running` for a launcher's command on this machine. build: makes the command; its argument is True for a
    restart."""
    return keep_running(lambda again, signals: run_command(build(again), signals), run_dir, max_restarts=max_restarts)


def keep_running(start: Callable[[bool, Forwarding], Outcome], run_dir: Path, *, max_restarts: int) -> tuple[int, bool]:
    """Run to the end. Returns the exit code, and whether a signal requested the end.

    start: starts all ranks and waits for their end; its first argument is True for a restart.
    The exit code is that of the rank that ended the run, if its status file contains one: a launcher replaces every
    code by its own 1.
    A signal between two starts ends this process at once.
    """
    attempts, again = Attempts(), False
    with Forwarding() as signals:
        while True:
            before = read_standing(run_dir)
            outcome = start(again, signals)
            death = _death(outcome)
            if outcome.to_stop:
                _report_end(run_dir)
            elif death:
                report_death(run_dir, death)
            after = read_standing(run_dir)
            verdict = judge(outcome.code, before=before, after=after, attempts=attempts, max_restarts=max_restarts)
            if outcome.to_stop or not verdict.restart:
                reason = CUT_OFF if outcome.to_stop and verdict.restart else verdict.reason
                return _end(outcome, before, after, reason, run_dir), outcome.to_stop
            _report(f"restart: {verdict.reason}", outcome, run_dir)
            time.sleep(PAUSE_SECONDS)
            attempts, again = verdict.attempts, True


def _death(outcome: Outcome) -> str | None:
    """Name of the signal that killed the launcher or a rank, as far as the launcher reports it: torchrun by name,
    deepspeed by an exit code of -N. Ranks that lose their launcher are asked to stop, and save, but nobody wanted the
    run to end."""
    if outcome.lost is not None:
        return outcome.lost
    if outcome.killed is not None:
        return f"the launcher was killed by {outcome.killed.name}"
    if outcome.relay.death is None and 256 - signal.NSIG < outcome.code < 256:
        return f"a rank was killed by {signal.Signals(256 - outcome.code).name}"
    return outcome.relay.death


def _report_end(run_dir: Path) -> None:
    """Record that a signal ended the ranks before they could record it themselves."""
    if read_status(run_dir).get("state") == RUNNING:
        report_death(run_dir, CUT_OFF)


def _end(outcome: Outcome, before: Standing, after: Standing, reason: str, run_dir: Path) -> int:
    """The exit code of a job that is not restarted; prints the reason of a failure."""
    code = outcome.code
    # A status from before the ranks' start belongs to an earlier start.
    said = outcome.started and after.status != before.status
    rank_code = after.status.get("exit_code") if said else None
    if code != EXIT_FINISHED and isinstance(rank_code, int):
        code = rank_code
    from trainer.report.page import report_end  # imported here: a twelfth of the time of `launch --help`

    report_end(run_dir, failing=code != EXIT_FINISHED)  # for ranks that were killed
    if code not in (EXIT_FINISHED, EXIT_STOPPED, EXIT_BAD_CONFIG):  # these have been explained in plain lines
        _report(f"the run failed: {reason} (exit code {code})", outcome, run_dir)
    return code


def _report(line: str, outcome: Outcome, run_dir: Path) -> None:
    why = str(read_status(run_dir).get("reason") or "")
    if why and outcome.relay.contains(why):
        line = line.replace(why, "as reported above", 1)
    kept = None
    with contextlib.suppress(OSError):  # for example a full disk, which the line reports
        kept = outcome.relay.keep(run_dir / "logs/errors.log")
    rest = f"; all that the ranks and the launcher wrote: {kept}" if kept else ""
    print(f"{line}{rest}", file=sys.stderr, flush=True)
