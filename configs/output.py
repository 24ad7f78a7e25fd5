"""Standard output and standard error whose failures never end a program.

Writes fail when the reader leaves (`| head`), the terminal is closed or the disk behind `> log` is full; Python then
fails once more when it flushes at exit (exit code 120). The results are in the run's folder, so the output is dropped
and the run continues. Entry points whose output is the product end with `delivered`, which reports the loss.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from configs import waiting
from configs.errors import EXIT_FAILED, EXIT_FINISHED

STREAMS = {1: "stdout", 2: "stderr"}
SECONDS_BELOW = " " * len("preparing")
_failed: dict[int, OSError] = {}


class _Raw(io.FileIO):
    """A file descriptor whose writes always succeed. Each write is tried: a disk may have room later."""

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:  # another process made the terminal or pipe non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            _failed.setdefault(self.fileno(), error)
        return memoryview(data).nbytes


def guard_output() -> None:
    """Let no write to this process's standard output and error raise. A second call does nothing."""
    for descriptor, name in STREAMS.items():
        stream = getattr(sys, name)
        if stream is None:  # already closed at the start: the next file to be opened must not take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and _is_plain(stream, descriptor):
            stream.flush()
            raw = _Raw(descriptor, "w", closefd=False)
            guarded = io.TextIOWrapper(
                io.BufferedWriter(raw) if isinstance(stream.buffer, io.BufferedWriter) else raw,  # PYTHONUNBUFFERED
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, guarded)


def announce(what: str, until: Callable[[], bool] | None = None) -> None:
    """Print which part of the preparation begins: one line, by rank 0; a terminal shows the seconds below it. stderr is
    for errors. until: see `waiting.show`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"preparing  {what}", flush=True)
        waiting.show(SECONDS_BELOW, until=until)


def delivered(code: int) -> int:
    """Exit code of an entry point whose standard output is its product: nonzero if output was lost for any reason other
    than a reader that left."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = _failed.get(1)
    if error is None or error.errno == errno.EPIPE or code != EXIT_FINISHED:
        return code
    print(f"standard output: cannot be written ({error.strerror}); what it shows is not complete", file=sys.stderr)
    return EXIT_FAILED


def _is_plain(stream: io.TextIOWrapper, descriptor: int) -> bool:
    """Whether this is the stream that Python opened, not a replacement by a test or a notebook."""
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return type(raw) is io.FileIO and raw.fileno() == descriptor
