"""Entries of the data cache: folders that one process of a machine builds and all others map into memory.

    CACHE_DIR/KEY/...          whatever the builder writes
    CACHE_DIR/KEY/meta.json    its presence says that the entry is whole

An entry is written under another name and renamed when it is complete, and a file lock lets one process of a machine
build while others wait. Whatever is killed, a half-written entry is never read, and a lock is released with its
process.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import filelock
import numpy as np

from configs.errors import DataError, first_line

META = "meta.json"

T = TypeVar("T")


def cached(cache_dir: str, key: str, *, build: Callable[[Path], None], read: Callable[[Path], T]) -> T:
    """The result of `read` on the entry's folder; `build` fills an empty one if no process has done it before.

    build: must write META last.
    read: an error about a value means that the entry is damaged.
    Raises DataError for a damaged entry, and for a cache folder that cannot be written.
    """
    folder = Path(os.path.expanduser(cache_dir)) / key
    try:
        if not (folder / META).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_suffix(".lock")):
                if not (folder / META).exists():
                    _fill(folder, build)
        try:
            return read(folder)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise damaged(folder, f"{META}: {first_line(error)}") from None
    except OSError as error:
        raise DataError(
            f"data.cache_dir={cache_dir}: cannot keep the tokenised text there ({error.strerror or first_line(error)});"
            " choose a folder on a disk with space that you can write"
        ) from None


def check_files(folder: Path, sizes: dict[str, int]) -> None:
    """Raise DataError unless each file has its size in bytes. Only a disk or a person can have changed a finished
    entry, so it is not silently made again."""
    for name, expected in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise damaged(folder, f"{name} holds {found} bytes, not {expected}")


def damaged(folder: Path, how: str) -> DataError:
    return DataError(f"data.cache_dir={folder.parent}: the entry {folder.name} is damaged ({how}); delete {folder}")


def token_dtype(vocabulary: int) -> str:
    """The narrowest unsigned integers that hold every token id. vocabulary: highest id + 1."""
    return np.dtype("uint16" if vocabulary <= 2**16 else "uint32").name


def _fill(folder: Path, build: Callable[[Path], None]) -> None:
    """Build into a folder of this machine, then give it its name."""
    partial = folder.with_suffix(f".{socket.gethostname()}.partial")
    # We hold the lock, so an existing folder was left by a killed builder.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        try:
            partial.rename(folder)
        except OSError:
            # On a file system without locks, another machine was faster; its entry is equally valid.
            if not (folder / META).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
