"""Refusals of a file system, in one line each: no space, no inodes, not allowed, not readable, missing.

    with writing(run_dir): ...                          before the first step: EnvironmentProblem, exit code 2
    with written("the exported model", folder): ...     while a run is on: OutputFailed, exit code 1
    with readable(path): ...                            EnvironmentProblem, exit code 2
    with refused(place, lambda why: ...): ...           any other line

Not every library raises OSError: safetensors has its own error and tokenizers a bare Exception, both with the
system's error number in the text. A restart fixes none of them, so status.json says `retry: false`. Torch-free.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import CookbookError, EnvironmentProblem, OutputFailed

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space or no inodes, quota used up, file larger than allowed."""
SPEED_BYTES = 64 * 2**20
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_NUMBER = re.compile(r"\(os error (\d+)\)")


def as_os_error(error: BaseException) -> OSError | None:
    """The file system's refusal that this error is or wraps; None if it has another cause."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if number := _NUMBER.search(str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) else None


def reason(error: OSError, place: Path) -> str:
    """The reason, for the brackets of a line. place: file or folder, which need not exist."""
    text = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        left = f"{mib(free_bytes(place))} are free"
        return f"no inodes left for new files, though {left}" if out_of_inodes(place) else f"{text}, {left}"
    return text


def out_of_inodes(place: Path) -> bool:
    """Whether the disk can hold no further file, however much space it has."""
    found = os.statvfs(existing(place))
    return found.f_files > 0 and found.f_ffree == 0


def free_bytes(place: Path) -> int:
    return shutil.disk_usage(existing(place)).free


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


@contextmanager
def refused(place: Path, problem: Callable[[str], CookbookError]) -> Iterator[None]:
    """Raise `problem(why)` instead of a library's or the system's error about a file or folder."""
    try:
        yield
    except CookbookError:
        raise
    except Exception as error:
        found = as_os_error(error)
        if found is None:
            raise
        raise problem(reason(found, place)) from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into one line about `train.run_dir`."""
    with refused(
        folder,
        lambda why: EnvironmentProblem(f"train.run_dir={folder}: cannot be written ({why}); choose a folder that can"),
    ):
        yield


@contextmanager
def written(what: str, place: Path) -> Iterator[None]:
    """Raise OutputFailed if a file that a run writes cannot be written."""
    with refused(
        place,
        lambda why: OutputFailed(
            f"{what}: cannot be written to {place} ({why}); make room there, or make it writable; the same command"
            " then goes on from the newest checkpoint"
        ),
    ):
        yield


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise EnvironmentProblem if this file or folder cannot be read."""
    with refused(path, lambda why: EnvironmentProblem(f"{path}: cannot be read ({why}); make it readable")):
        yield


def disk_problem(error: BaseException, who: str = "") -> OutputFailed | None:
    """One line for a refusal without a message yet: a full disk, or a named file without permission. None for any other
    error. who: begins the line."""
    found = as_os_error(error)
    if found is None or found.errno not in FULL | NOT_ALLOWED:
        return None
    if found.errno in NOT_ALLOWED and found.filename is None:
        return None
    name = found.filename
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else Path.cwd()
    what = f"{path}: cannot be used" if name is not None else "a file cannot be written"
    return OutputFailed(f"{who}{what} ({reason(found, path)}); make room there, or make it accessible")


def existing(place: Path) -> Path:
    """The folder in which the first missing part would be created."""
    return next((path for path in (place, *place.absolute().parents) if os.path.exists(path)), Path("/"))


def write_speed(folder: Path) -> float | None:
    """Write speed in bytes per second, of a file that is flushed to disk; None if nothing can be written."""
    path, block = folder / f".speed-{os.getpid()}", os.urandom(2**20)
    try:
        begin = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(SPEED_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return SPEED_BYTES / (time.perf_counter() - begin)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            path.unlink()
