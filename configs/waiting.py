"""One line on a terminal that says what is being waited for, and for how many seconds; printed nowhere else.

The next output overwrites it. Of a job's ranks only the first shows it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TextIO

PATIENCE = 1.0
"""Seconds before the line is shown."""
EVERY = 1.0
"""Seconds between two writes."""
ERASE = "\r\x1b[K"
_begun = time.monotonic()
_line: _Line | None = None


def show(text: str, *, until: Callable[[], bool] | None = None) -> None:
    """Wait for this from now on, until `clear`. until: returns True once another process has begun to write."""
    _wait(_Wait(text, until))


def clear() -> None:
    """End the line, before an answer or a bar is printed."""
    global _line
    if _line is not None:
        _line.end()
        _line = None


@contextlib.contextmanager
def on(text: str) -> Generator[None]:
    """Wait for this while the body runs; afterwards restore the previous line."""
    line = _line if _line is not None and _line.is_alive() else None
    before = None if line is None else line.wait
    show(text)
    try:
        yield
    finally:
        if before is None:
            clear()
        elif _line is line:  # it has not been cleared meanwhile
            _wait(before)


@dataclass(frozen=True, slots=True)
class _Wait:
    text: str
    until: Callable[[], bool] | None
    since: float = field(default_factory=time.monotonic)


def _wait(wait: _Wait) -> None:
    global _line
    if os.environ.get("RANK", "0") != "0" or (stream := _terminal()) is None:
        return
    if _line is None or not _line.is_alive():
        _line = _Line(stream, wait)
        _line.start()
    else:
        _line.wait = wait
    if time.monotonic() - _begun > PATIENCE:
        _line.write()


def _terminal() -> TextIO | None:
    """Standard error, unless a launcher has redirected it; else standard output."""
    streams = (sys.stderr, sys.stdout)
    return next((stream for stream in streams if stream is not None and stream.isatty()), None)


class _Line(threading.Thread):
    def __init__(self, stream: TextIO, wait: _Wait) -> None:
        super().__init__(daemon=True)
        self.wait = wait
        self._stream, self._lock, self._ended, self._shown = stream, threading.Lock(), threading.Event(), False

    def run(self) -> None:
        while not self._ended.wait(EVERY):
            if self.wait.until is not None and self.wait.until():
                self._shown = False
                return
            self.write()

    def write(self) -> None:
        seconds = int(time.monotonic() - self.wait.since)
        text = f"{self.wait.text}  {seconds} s" if seconds else self.wait.text
        with self._lock:
            if not self._ended.is_set():
                self._put(f"{ERASE}{text}\r")  # the cursor stays at the head of the line
                self._shown = True

    def end(self) -> None:
        self._ended.set()
        self.join()
        if self._shown:
            self._put(ERASE)

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self._stream.write(text)
            self._stream.flush()
