"""Disks and permissions for tests: a small file system, and a root user that obeys permissions."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# From linux/capability.h: the version of the structures, and the two bits that let root ignore permissions.
_VERSION, _PASS_OVER = 0x20080522, (1 << 1) | (1 << 2)


@contextmanager
def small_disk(folder: Path, *, size: str, inodes: int = 1000) -> Iterator[Path]:
    """Mount a tmpfs of this size on `folder`; skip the test if mounting is not allowed.

    size: size option of tmpfs, such as 4m.
    """
    folder.mkdir()
    options = f"size={size},nr_inodes={inodes},mode=700"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def permissions_obeyed() -> Iterator[None]:
    """Make this thread obey file permissions even if it runs as root."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the first 32 capabilities; of the others
    if libc.capget(head, sets):
        raise OSError(ctypes.get_errno(), "capget")
    before, sets[0] = sets[0], sets[0] & ~_PASS_OVER
    if libc.capset(head, sets):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(head, sets)


@contextmanager
def closed_to_all(path: Path) -> Iterator[None]:
    """Deny everyone access to a path, including root (by `permissions_obeyed`)."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with permissions_obeyed():
            yield
    finally:
        path.chmod(mode)


def fill(folder: Path) -> Path:
    """Fill the disk of `folder`. Returns the file to delete."""
    file = folder / "filler"
    with open(file, "wb", buffering=0) as filler:
        for block in (2**16, 2**12, 1):
            try:
                while True:
                    filler.write(b"x" * block)
            except OSError:
                continue
    return file


def take_inodes(folder: Path) -> Path:
    """Use up the inodes of the disk of `folder`. Returns the folder to delete."""
    many = folder / "many"
    many.mkdir()
    try:
        for number in range(10**6):
            os.close(os.open(many / str(number), os.O_CREAT))
    except OSError:
        pass
    return many
