"""Standard output and standard error that never decide about a program.

A reader that leaves (`| head`), a terminal that is closed and a full disk behind `> log` make each write fail, here and
once more when Python flushes at its exit (exit code 120). What a run computes is in its folder, so its output is
dropped and it goes on. Doors whose output is the product end with `delivered`, which tells.
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
    """A file descriptor whose writes always succeed. It is tried again each time: a disk may have room later."""

    def write(self, data: Any, /) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                written = super().write(left)
                if written is None:  # another process has made the terminal or pipe non-blocking
                    select.select([], [self], [])
                left = left[written or 0 :]
        except OSError as error:
            _failed.setdefault(self.fileno(), error)
        return memoryview(data).nbytes


def guard_output() -> None:
    """Let no write to this process's standard output and error raise. A second call does nothing."""
    for descriptor, name in STREAMS.items():
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process: the next file to be opened must not take its place
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
    """Say which part of the preparation begins: one line, of rank 0, and on a terminal its seconds below. stderr is for
    what is wrong. until: see `waiting.show`."""
    if os.environ.get("RANK", "0") == "0":
        print(f"preparing  {what}", flush=True)
        waiting.show(SECONDS_BELOW, until=until)


def delivered(code: int) -> int:
    """The exit code of a door whose standard output is its product: not 0 where some of it was lost for another reason
    than that nobody reads on."""
    if sys.stdout is not None:
        sys.stdout.flush()
    error = _failed.get(1)
    if error is None or error.errno == errno.EPIPE or code != EXIT_FINISHED:
        return code
    print(f"standard output: cannot be written ({error.strerror}); what it shows is not complete", file=sys.stderr)
    return EXIT_FAILED


def _is_plain(stream: io.TextIOWrapper, descriptor: int) -> bool:
    """Whether this is the stream that Python opened, and not one that a test or a notebook put in its place."""
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return type(raw) is io.FileIO and raw.fileno() == descriptor
