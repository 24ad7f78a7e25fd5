"""Requests to stop: by a signal, or by a file named STOP in the run folder.

    SIGTERM, SIGINT, SIGUSR1       what schedulers and people send; one rank that gets it is enough
    SIGHUP                         the terminal was closed; under nohup it stays ignored
    touch RUN_DIR/STOP             from anywhere that sees the folder
    Run.stop                       a callback, on any rank (`trainer.report.callbacks`)
    its launcher is gone           see `lifeline`, which sends SIGTERM

The handler only records the request. At the next step boundary the ranks agree, save a checkpoint, and the process ends
with exit code 75, or 0 if COOKBOOK_QUIET_STOP is set. A second SIGINT ends it at once: by then the system's own handler
is restored, so this works even if Python itself is stuck, and an interrupted save was never committed.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

from trainer.process.lifeline import lost

log = logging.getLogger(__name__)

STOP_FILE = "STOP"
QUIET_STOP = "COOKBOOK_QUIET_STOP"
"""Variable that turns exit code 75 into 0, for supervisors that read status.json: launchers treat any other code as a
failure, end the other ranks, and fill the log with a report."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequests:
    """Context in which signals are recorded. folder: of the run; None on ranks that need not look for the file."""

    def __init__(self, folder: Path | None) -> None:
        self._file = folder / STOP_FILE if folder else None
        self._signal: str | None = None
        self._obeyed = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # Python runs handlers only in the main thread, and only that thread may install them.
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            ours = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
            self._before = {number: signal.signal(number, self._note) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        if self._obeyed and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # A launcher that sees the first rank leave sends SIGTERM to the others, which are about to end too.
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def reason(self) -> str | None:
        """Why this rank was asked to stop; None if it was not."""
        # A file system that does not answer for a moment must not end the run; `Path.exists` would raise.
        if self._signal is None and self._file is not None and os.path.exists(self._file):
            return f"{self._file} is there"
        return self._signal

    def ask(self, reason: str) -> None:
        """Stop, as if this rank had received a signal."""
        self._signal = self._signal or reason

    def obeyed(self) -> None:
        """The run has saved and ends, whichever rank was asked. The file must not stop the next start too."""
        self._obeyed = True
        if self._file is not None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s: cannot be deleted (%s); the next start will stop too", self._file, error.strerror)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or lost() or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
