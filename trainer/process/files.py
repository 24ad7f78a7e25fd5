"""Bytes that are on the disk when a call returns.

A rename is atomic, but a power cut may reorder it with the data before it: hence fsync of the file before the
rename, and of the folder after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHUNK_BYTES = 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a new file and flush it."""
    with open(path, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Give a file a new content: a reader, or a power cut, meets the old or the new one, never a part. shared: several
    processes may do so at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        write_synced(partial, text)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def overwrite_text(path: Path, text: str) -> None:
    """Write a new content over the old one: for a disk that is full, where the blocks of a small file are there already
    and those of a new file are not. A reader may meet a part."""
    with open(path, "r+") as file:
        file.write(text)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def rename_synced(source: Path, target: Path) -> None:
    source.rename(target)
    sync(target.parent)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
