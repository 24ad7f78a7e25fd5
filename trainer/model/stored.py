"""Contents of a folder of safetensors: names, dtypes and shapes, read only from the headers.

    find_folder     model.path                 -> a folder that is here (downloaded from the hub if it is a hub id)
    read_config     the folder's config.json   -> its fields
    read_tensors    headers of all shards      -> {name: file, dtype, shape}

No value is read and nothing of the folder is executed. Anything damaged, foreign or missing is a DataError that names
the file and the remedy, one line for each file. Next: `fitting`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from configs.errors import DataError, first_line
from configs.schema import Model

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100 * 2**20  # the format's own limit


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header describes it. dtype: in the format's spelling, `F32` or `F8_E4M3`."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def local_folder(path: str) -> Path | None:
    """The folder that `model.path` names on this machine; None if it can only be a hub id. Raises DataError for a path
    that can only be a folder and is not one."""
    folder = Path(path).expanduser()
    if path.strip() and folder.is_dir():
        return folder
    if path.strip() and folder.exists():
        raise DataError(f"model.path={path}: is a file; give the folder that holds {CONFIG} and {SINGLE}")
    owner, slash, _ = path.partition("/")
    if (
        owner in ("", ".", "..")
        or path.startswith("~")
        or path.endswith("/")
        or path.count("/") > 1
        or not path.strip()
    ):
        raise DataError(f"model.path={path}: no such folder; give a folder with {CONFIG}, or a hub id (owner/name)")
    if slash and Path(owner).is_dir():
        # A mistyped `runs/modle` would wait for the hub, which has no owner of that name.
        raise DataError(
            f"model.path={path}: no such folder in {owner}/, which is here; give one that is there, or start where no"
            " folder has the name of the hub's owner"
        )
    return None


def find_folder(model: Model) -> Path:
    """The folder with the weights of `model.path`. Raises DataError."""
    assert model.path is not None
    folder = local_folder(model.path)
    if folder is not None:
        return folder
    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, of the network below it, of the disk
        raise DataError(not_on_the_hub(model.path, error)) from None


def not_on_the_hub(path: str, error: Exception) -> str:
    """The line about an unreadable hub id."""
    return f"model.path={path}: no such folder here, and the hub does not give it ({first_line(error)})"


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The fields of a folder's config.json. key: `model.path=...`, for the message. Raises DataError."""
    try:
        if (folder / CONFIG).exists() and not (folder / CONFIG).is_file():
            raise DataError(f"{key}: {CONFIG} is no file; give the model's own")
        fields = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise DataError(_without_config(key)) from None
    except OSError as error:
        raise DataError(f"{key}: {CONFIG} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        said = first_line(error) if isinstance(error, ValueError) else "nested too deeply"
        raise DataError(f"{key}: {CONFIG} is not JSON ({said}); {_how_damaged(folder / CONFIG)}") from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{key}: {CONFIG} holds a {type(fields).__name__}, not an object of fields; give the model's own file"
        )
    return fields


def read_tensors(folder: Path, key: str) -> dict[str, Stored]:
    """Every tensor of a folder in the Hugging Face format, from the headers of its shards.

    key: `model.path=...`, for the messages. Raises DataError with a line for each unusable file.
    """
    # In transformers' order: the single file first.
    single, index = folder / SINGLE, folder / INDEX
    if not (single.exists() or single.is_symlink()) and (index.exists() or index.is_symlink()):
        weight_map = _read_index(folder, key)
    elif single.exists() or single.is_symlink():
        weight_map = None
    else:
        raise DataError(_without_safetensors(folder, key))
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for shard in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        try:
            held = _read_header(folder / shard)
        except DataError as error:
            problems += (f"{key}: {shard} {problem}" for problem in error.problems)
            continue
        if weight_map is not None:
            listed = [name for name, file in weight_map.items() if file == shard]
            absent = [name for name in listed if name not in held]
            if absent:
                problems.append(
                    f"{key}: {shard} does not hold {some(absent)}, which {INDEX} promises; both must be of one save:"
                    " copy the folder again"
                )
            held = {name: stored for name, stored in held.items() if weight_map.get(name, shard) == shard}
        tensors.update(held)
    if problems:
        raise DataError(*problems)
    return tensors


def some(names: list[str], *, limit: int = 3) -> str:
    """The first names of a list, and the number of the others."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _read_index(folder: Path, key: str) -> dict[str, str]:
    try:
        if (folder / INDEX).exists() and not (folder / INDEX).is_file():
            raise DataError(f"{key}: {INDEX} is no file; copy the folder again")
        content = json.loads((folder / INDEX).read_bytes())
    except OSError as error:
        raise DataError(f"{key}: {INDEX} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError):
        raise DataError(f"{key}: {INDEX} is not JSON; {_how_damaged(folder / INDEX)}") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise DataError(
            f'{key}: {INDEX} has no "weight_map" from tensor names to files; give the index that was saved with the'
            " shards"
        )
    outside = [shard for shard in sorted(set(weight_map.values())) if not _inside(shard)]
    if outside:
        raise DataError(
            f"{key}: {INDEX} names {some(outside)} outside of the folder; shards lie in the folder itself: give the"
            " index that was saved with them"
        )
    return weight_map


def _inside(shard: str) -> bool:
    path = Path(shard)
    return bool(shard) and "\0" not in shard and not path.is_absolute() and ".." not in path.parts


def _read_header(path: Path) -> dict[str, Stored]:
    """Raises DataError whose problems continue after the name of the file."""
    try:
        if not path.is_file():
            kind = "is no file" if path.exists() else "is not there"
            raise DataError(f"{kind}; copy the folder again, with all its shards")
        reason = _foreign(path)
        if reason is not None:
            raise DataError(reason)
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, safe_open has no iterator
            return {n: Stored(path.name, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}); make it readable") from None
    except (SafetensorError, ValueError) as error:
        said = first_line(error).removeprefix("Error while deserializing header: ")
        raise DataError(f"is damaged ({said}); copy or download it again") from None


def _foreign(path: Path) -> str | None:
    """Why a file cannot be safetensors, by its first bytes and its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(64)
    if size == 0:
        return "is empty; copy or download it again"
    if begin.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run git lfs pull in its folder"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the weights: a download that was refused; download it again"
    # A length of eight bytes comes first, and may look like a pickle; then the header, which is JSON.
    if begin[8:9] != b"{" and begin.startswith((b"PK\3\4", b"\x80\2", b"\x80\4")):
        return f"is a pickle of torch.save, which is never executed; convert it to {SINGLE}"
    header = int.from_bytes(begin[:8], "little")
    if size < 8 or (header <= LARGEST_HEADER and size < 8 + header):
        return f"is truncated ({size:,} bytes); copy or download it again"
    return None


def _how_damaged(path: Path) -> str:
    try:
        reason = _foreign(path)
    except OSError:
        reason = None
    known = reason is not None and reason.startswith(("is empty", "is a Git", "is a web"))
    return f"it {reason}" if known else "copy or download it again"


def _without_config(key: str) -> str:
    return f"{key}: has no {CONFIG}; give the folder of a model in the Hugging Face format"


def _without_safetensors(folder: Path, key: str) -> str:
    names = sorted(path.name for path in _listing(folder))
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        return (
            f"{key}: {some(pickles)} can run code when it is read, so it is not read; convert it to {SINGLE}"
            " (transformers: save_pretrained) on a machine where you trust it"
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"; it has {some(others)}, which is another format: convert it" if others else ""
    return f"{key}: has neither {SINGLE} nor {INDEX}{found or '; give the folder of a saved model'}"


def _listing(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return
