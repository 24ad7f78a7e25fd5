"""Writes whose bytes are on the disk when the call returns.

A rename is atomic, but a power cut may reorder it with earlier data. Hence fsync of the file before the rename, and
of the folder after it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHUNK_BYTES = 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to disk."""
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
    """Replace a file's content atomically: a reader, or a power cut, sees the old or the new content. shared: several
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
    """Overwrite a file in place, for a full disk: it has the blocks of a small existing file, but none for a new one. A
    reader may see a part."""
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
