"""The manifest: the contents of a complete checkpoint. It is written last, and read and checked first.

safetensors, like every other tensor format, loads a file with a flipped bit without complaint. The manifest records
each file's size and SHA-256, and its own, and nothing is parsed before it has passed the check.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import CheckpointDamaged, CheckpointMismatch, EnvironmentProblem
from trainer.checkpoint.catalog import step_of
from trainer.process.disks import MISSING
from trainer.process.files import sha256, write_synced

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TOKENIZER = "tokenizer"
GENERATION = "generation_config.json"  # of the model's own folder, in the tokenizer's
# Also confines a manifest from elsewhere to its folder: no name here can hold a path.
FILE_NAME = re.compile(rf"rank-\d{{5}}-\d{{3,}}\.safetensors|{re.escape(STATE)}|{TOKENIZER}/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """files: by their name in the folder. tensors: key -> name of the file that holds it."""

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())


def entry_of(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write and flush it."""
    body = {"format_version": FORMAT_VERSION, **asdict(manifest)}
    write_synced(folder / MANIFEST, json.dumps({"sha256": _digest(body), **body}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointDamaged if it is missing or incomplete, CheckpointMismatch for a newer format."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        check_missing(path, error)
        raise CheckpointDamaged(f"{path}: expected a manifest, found none ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise CheckpointDamaged(f"{path}: expected a manifest in JSON, found something else") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointMismatch(
            f"{folder}: written in checkpoint format {version}, this version reads up to {FORMAT_VERSION}; install the"
            " newer version of the project that wrote it"
        )
    return _parse(path, content)


def _parse(path: Path, content: Any) -> Manifest:
    try:
        body = {key: value for key, value in content.items() if key != "sha256"}
        expected, found = content["sha256"], _digest(body)
        if expected != found:
            raise CheckpointDamaged(f"{path}: expected SHA-256 {expected}, found {found}")
        files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
        manifest = Manifest(step=int(body["step"]), files=files, tensors=dict(body["tensors"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"{path}: expected a manifest, found other content ({error!r})") from None
    strange = [name for name in manifest.files if not FILE_NAME.fullmatch(name)]
    strange += [name for name in manifest.tensors.values() if name not in manifest.files]
    if strange or STATE not in manifest.files:
        raise CheckpointDamaged(
            f"{path}: expected names of checkpoint files, found {strange or sorted(manifest.files)}"
        )
    return manifest


def check_missing(path: Path, error: OSError) -> None:
    """Raises EnvironmentProblem unless the error means that there is no such file. An unreadable file may be intact: a
    wrong permission or a disk error is no damage, and must not make the run continue from an older checkpoint."""
    if error.errno not in MISSING:
        raise EnvironmentProblem(
            f"{path}: cannot be read ({error.strerror or error}); make it readable, or move the checkpoint away to"
            " go on from the one before"
        ) from None


def check_file_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointDamaged naming each file that is missing, truncated, or not in the manifest, and a folder whose
    name has another step. Reads no content."""
    problems = []
    named = step_of(folder)
    if named not in (None, manifest.step):
        problems.append(f"{folder}: expected step {manifest.step}, which its manifest has, found {named} in its name")
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            found = path.lstat()
        except OSError as error:
            check_missing(path, error)
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            problems.append(f"{path}: expected a file of {entry.bytes} bytes, found none")
        elif found.st_size != entry.bytes:
            problems.append(f"{path}: expected {entry.bytes} bytes, found {found.st_size}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest.files:
            problems.append(f"{path}: expected no such file, found {path.stat().st_size} bytes")
    if problems:
        raise CheckpointDamaged(*problems)


def check_contents(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read these files whole. Raises CheckpointDamaged naming each whose SHA-256 is not the manifest's."""
    problems = []
    for name in names:
        expected = manifest.files[name].sha256
        try:
            found = sha256(folder / name)
        except OSError as error:
            check_missing(folder / name, error)
            problems.append(f"{folder / name}: expected a file, found none ({error.strerror})")
            continue
        if found != expected:
            problems.append(f"{folder / name}: expected SHA-256 {expected}, found {found}")
    if problems:
        raise CheckpointDamaged(*problems)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
