"""status.json, the state of a run for readers of its folder, and the lock that keeps a second run out.

    state      running | finished | stopped | failed     a process that is killed leaves `running` behind, and no lock
    step       optimizer updates that were made
    reason     why it is not running any more, in one line; of one that has finished: why before its last step
    exit_code  of the rank that wrote it
    retry      false: a restart would fail again; the user has to mend something
    best       the best validation so far (metric, value, step) and its checkpoint, where one is kept
    waited     finished early: after so many validations that were no better
    epochs     that the run was to take, where they say how long it is

Exit codes alone do not carry this: a launcher turns a worker's 75 into its own 1.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from configs.choices import Schedule
from configs.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    CookbookError,
    EnvironmentProblem,
    PlanError,
    RankStuck,
    RunFinished,
)
from configs.schema import Config
from trainer.process.disks import disk_problem, readable, reason, writing
from trainer.process.files import overwrite_text, read_json, replace_text

log = logging.getLogger(__name__)

STATUS = "status.json"
LOCK = ".lock"
# The first rank that fails knows the cause; the ranks that wait for it fail as a consequence.
_FIRST_FAILURE = ".first-failure"
FINISHED, STOPPED, FAILED, RUNNING = "finished", "stopped", "failed", "running"


class RunStatus:
    """Context of a run, on every rank: writes the status at its end, also after an error. `begin` comes before.

    epochs: `train.epochs`."""

    def __init__(self, folder: Path, rank: int, *, epochs: float = 0.0) -> None:
        self._folder, self._rank, self._epochs = folder, rank, epochs
        self._step: Callable[[], int] = lambda: 0
        self._stopped: str | None = None
        self._early: str | None = None
        self._more: Callable[[], Mapping[str, object]] = dict

    def follow(self, step: Callable[[], int], more: Callable[[], Mapping[str, object]]) -> None:
        """step: returns the number of updates so far. more: `best` and `waited`, if there are any."""
        self._step, self._more = step, more

    def early(self, reason: str) -> None:
        """The run ends before its last step, as finished."""
        self._early = reason

    def stopped(self, reason: str) -> int:
        """The run ends on request. Returns the exit code."""
        self._stopped = reason
        return EXIT_STOPPED

    def begin(self) -> None:
        """The run begins. Raises EnvironmentProblem, on rank 0 only, if the folder cannot be written."""
        with writing(self._folder):
            if self._rank == 0:
                (self._folder / _FIRST_FAILURE).unlink(missing_ok=True)
                self._write(RUNNING, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._fail(error)
            elif self._rank == 0 and self._stopped is not None:
                self._write(STOPPED, self._stopped, EXIT_STOPPED)
            elif self._rank == 0:
                self._write(FINISHED, self._early, EXIT_FINISHED)
        except OSError as refusal:
            # The run's result does not depend on whether it can be written down.
            log.warning("%s: cannot be written (%s)", self._folder / STATUS, reason(refusal, self._folder))
        finally:
            unlock(self._folder)

    def _fail(self, error: BaseException) -> None:
        _ignore_loaders()
        error = disk_problem(error, f"rank {self._rank}: ") or error
        text = (str(error).strip().splitlines() or [""])[0]
        code = error.exit_code if isinstance(error, CookbookError) else EXIT_FAILED
        why = text if isinstance(error, CookbookError) else f"rank {self._rank}: {type(error).__name__}: {text}"
        try:
            open(self._folder / _FIRST_FAILURE, "x").close()
        except FileExistsError:
            return  # another rank was first
        except OSError:  # a disk without inodes: the first rank to fail is unknown
            if read_status(self._folder).get("state") == FAILED:
                return
        retry = isinstance(error, RankStuck) or not isinstance(error, CookbookError)
        self._write(FAILED, why, code, retry=retry)

    def _write(self, state: str, reason: str | None, exit_code: int | None, *, retry: bool = True) -> None:
        content = {
            "state": state,
            "step": self._step(),
            "reason": reason,
            "exit_code": exit_code,
            "retry": retry,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self._more(),
            **({"epochs": self._epochs} if self._epochs else {}),
        }
        _put(self._folder, content)


def _put(folder: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    try:
        replace_text(folder / STATUS, text)
    except OSError:
        if not (folder / STATUS).exists():
            raise
        overwrite_text(folder / STATUS, text)


def _ignore_loaders() -> None:
    """torch raises the death of a loader process from a signal handler, at any point of this process. Disabled while
    the failure is recorded."""
    for _ in range(2):  # it may arrive while it is being disabled
        with contextlib.suppress(RuntimeError, ValueError):  # ValueError: another thread than the main one
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def report_death(folder: Path, why: str) -> None:
    """Record how the run ended, for a killed rank that could not. Called by its launcher when all ranks are gone.

    The other ranks wrote that a connection was closed, or that they were asked to stop. Does nothing if no run has
    begun, or if it has finished.
    """
    content = read_status(folder)
    if content and content.get("state") != FINISHED:
        content |= {"state": FAILED, "reason": why, "exit_code": EXIT_FAILED, "retry": True}
        try:
            _put(folder, content)
        except OSError as refusal:  # the launcher's own last line gives the reason
            log.warning("%s: cannot be written (%s)", folder / STATUS, reason(refusal, folder))


def read_status(folder: Path) -> dict[str, object]:
    """Content of status.json; empty if it cannot be read."""
    return read_json(folder / STATUS)


def check_unfinished(config: Config, folder: Path) -> None:
    """Raises RunFinished if the folder's run is finished and no further steps are requested. Raises PlanError if they
    are but cannot follow: the learning rate has decayed to its end, and more steps would change its schedule.

    Under a constant schedule a step does not depend on their number, so the run continues.
    """
    status = read_status(folder)
    step = status.get("step")
    if status.get("state") != FINISHED:
        return
    if (waited := status.get("waited")) is not None:
        if config.train.patience and isinstance(waited, int) and config.train.patience <= waited:
            raise RunFinished(
                f"train.run_dir={folder}: this run is finished, at step {step}: {status.get('reason')}; to train on,"
                " give a larger train.patience, or 0"
            )
        return
    epochs, steps = config.train.epochs, config.train.steps
    key, given = ("train.epochs", f"{epochs:g}") if epochs else ("train.steps", str(steps))
    if is_through(status, steps=steps, epochs=epochs):
        raise RunFinished(
            f"train.run_dir={folder}: this run is finished, at step {step}; to train on, give more {key} with"
            f" scheduler=constant, or begin a new run with train.resume={folder}, another train.run_dir and more"
            f" {key}"
        )
    if config.scheduler.name is not Schedule.constant:
        raise PlanError(
            f"{key}={given}: the run in {folder} is finished, at step {step}, and"
            f" scheduler={config.scheduler.name} has brought the learning rate to its end there; begin a new run with"
            f" train.resume={folder} and another train.run_dir, or give scheduler=constant to go on in this one"
        )


def is_through(status: Mapping[str, object], *, steps: int, epochs: float) -> bool:
    """Whether the run is finished, and no more steps are requested than it was to take."""
    if status.get("state") != FINISHED:
        return False
    step, before = status.get("step"), status.get("epochs")
    if epochs:
        # The data determines the number of steps: after a run given in steps the start ends at once, or trains on.
        return status.get("waited") is None and isinstance(before, int | float) and epochs <= before
    return not isinstance(step, int) or steps <= step


_held: dict[Path, TextIO] = {}


def lock(folder: Path) -> None:
    """Reserve the folder for this process until `unlock`, or until the process ends in any way.

    Raises EnvironmentProblem naming the process that holds it. The lock is the kernel's (fcntl): it is released with
    its process, also by SIGKILL, and is not inherited by loader processes that outlive it for a moment.
    """
    if folder in _held:
        return
    file = open(folder / LOCK, "a+")  # noqa: SIM115  closing it would give the lock back
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        problem = _taken(folder, file)
        file.close()
        raise problem from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n{_launcher()}\n")
    file.flush()
    _held[folder] = file


def unlock(folder: Path) -> None:
    """Release the folder: the process that has run in it may continue."""
    if (file := _held.pop(folder, None)) is not None:
        file.close()


def check_idle(folder: Path) -> None:
    """Raises EnvironmentProblem if a run is under way in the folder. For a launcher, whose ranks would need seconds to
    find out, and could report it only by an exit code."""
    with readable(folder / LOCK), contextlib.suppress(FileNotFoundError), open(folder / LOCK) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise _taken(folder, file) from None


def _taken(folder: Path, file: TextIO) -> EnvironmentProblem:
    file.seek(0)
    owner = file.readline().strip() or "another process"
    return EnvironmentProblem(
        f"train.run_dir={folder}: a run is going on in it ({owner}); wait for its end, or choose another folder"
    )


def restarted_in(folder: Path) -> bool:
    """Whether the folder was claimed by an earlier start of the same job, whose worker torchrun has restarted
    (`--max-restarts`): the same overrides then mean to continue it."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return False
    try:
        return (folder / LOCK).read_text().splitlines()[1:] == [_launcher()]
    except OSError:
        return False


def _launcher() -> str:
    """The process that started this one: its id, and its start time, since ids are reused."""
    import psutil

    parent = psutil.Process(os.getppid())
    return f"started by pid {parent.pid} of {parent.create_time():.2f} on {socket.gethostname()}"
