"""One line on a terminal that says what is being waited for, and for how many seconds; nothing anywhere else.

Whatever is printed next takes its place. Of a job's ranks the first alone shows it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

PATIENCE = 1.0
"""Seconds after which a person wonders."""
ERASE = "\r\x1b[K"
_begun = time.monotonic()
_line: _Line | None = None


def show(text: str, *, at_once: bool = False, until: Callable[[], bool] | None = None) -> None:
    """From now on this is waited for. at_once: do not let a second pass first, because it is known to take longer.
    until: says that another process has begun to write, for which this line makes way."""
    global _line
    if os.environ.get("RANK", "0") != "0" or (stream := _terminal()) is None:
        return
    if _line is None or not _line.is_alive():
        _line = _Line(stream)
        _line.wait_for(text, at_once, until)
        _line.start()
    else:
        _line.wait_for(text, at_once, until)


def clear() -> None:
    """Before an answer, a problem or a bar is printed."""
    global _line
    if _line is not None:
        _line.end()
        _line = None


def _terminal() -> TextIO | None:
    """Standard error, which a launcher may have taken for itself, or standard output."""
    streams = (sys.stderr, sys.stdout)
    return next((stream for stream in streams if stream is not None and stream.isatty()), None)


class _Line(threading.Thread):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(daemon=True)
        self._stream, self._lock, self._ended, self._shown = stream, threading.Lock(), threading.Event(), False
        self._text, self._since = "", 0.0
        self._until: Callable[[], bool] | None = None

    def wait_for(self, text: str, at_once: bool, until: Callable[[], bool] | None) -> None:
        with self._lock:
            self._text, self._since, self._until = text, time.monotonic(), until
            if text and (at_once or self._since - _begun > PATIENCE):
                self._write(text)

    def run(self) -> None:
        while not self._ended.wait(PATIENCE):
            with self._lock:
                if self._until is not None and self._until():
                    self._shown = False
                    return
                if not self._ended.is_set():
                    self._write(f"{self._text}  {time.monotonic() - self._since:.0f} s")

    def end(self) -> None:
        self._ended.set()
        with self._lock:
            if self._shown:
                self._write("")

    def _write(self, text: str) -> None:
        """The cursor stays at the head of the line."""
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone
            self._stream.write(f"{ERASE}{text}\r" if text else ERASE)
            self._stream.flush()
            self._shown = True
