"""The folder of a torch distributed checkpoint: `.metadata`, a pickled index, and `*.distcp`.

.metadata      read by the names that torch writes into it; another name is refused before anything is made of it
__0_0.distcp   one torch.save after another; a tensor is joined from the pieces of all ranks when it is asked for
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from configs.errors import CheckpointDamaged, CheckpointMismatch
from configs.imports.restricted import Refused, Restricted
from trainer.checkpoint.foreign.pickles import refusal
from trainer.process.disks import as_os_error, readable

METADATA = ".metadata"
CLASSES = {
    metadata.__name__: (
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"),
    "collections": ("OrderedDict",),
}
_MODULES: Mapping[str, Any] = {
    metadata.__name__: metadata,
    filesystem.__name__: filesystem,
    "torch": torch,
    "torch.serialization": torch.serialization,
}


class _Reader(Restricted):
    def answer(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name not in CLASSES.get(module, ()):
            return None
        if module == "pathlib":
            return pathlib.PurePosixPath
        return getattr(_MODULES[module], name) if module in _MODULES else dict


class Folder:
    """Tensors and plain values of a folder by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _read_metadata(path / METADATA)
        self._places: dict[MetadataIndex, Any] = {
            MetadataIndex(index.fqn, index.offset): place for index, place in self._known.storage_data.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by key."""
        entries = self._known.state_dict_metadata.items()
        return {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def values(self) -> list[str]:
        """Keys of values that are not tensors."""
        entries = self._known.state_dict_metadata.items()
        return [key for key, entry in entries if not isinstance(entry, TensorStorageMetadata)]

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU. Raises CheckpointDamaged."""
        entry = self._known.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            piece = self._load(MetadataIndex(key, chunk.offsets))
            if not isinstance(piece, torch.Tensor) or tuple(piece.shape) != tuple(chunk.sizes):
                raise CheckpointDamaged(f"{self.path}: expected a piece of {key} of {list(chunk.sizes)}, found another")
            place = tuple(slice(a, a + size) for a, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place].copy_(piece)
            filled += piece.numel()
        if filled < whole.numel():
            raise CheckpointDamaged(f"{self.path}: expected {whole.numel():,} values of {key}, found {filled:,}")
        return whole

    def value(self, key: str) -> Any:
        return self._load(MetadataIndex(key))

    def _load(self, index: MetadataIndex) -> Any:
        place = self._places.get(index)
        if place is None or Path(place.relative_path).name != place.relative_path:
            raise CheckpointDamaged(f"{self.path}: expected {index.fqn} in its {METADATA}, found no place of it")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointMismatch(
                f"{self.path}: its files are compressed, which is not read; save them without that"
            )
        file = self.path / place.relative_path
        if not file.is_file():
            raise CheckpointDamaged(f"{file}: expected a file, found none")
        try:
            with readable(file), file.open("rb") as stream:
                stream.seek(place.offset)
                content = stream.read(place.length)
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a truncated or foreign file can fail in any reader
            if as_os_error(error) is not None:
                raise
            raise refusal(file, error) from None


def _read_metadata(file: Path) -> metadata.Metadata:
    try:
        with readable(file):
            content = file.read_bytes()
        found = _Reader(io.BytesIO(content)).load()
        if isinstance(found, metadata.Metadata) and isinstance(found.storage_data, dict):
            return found
        said = f"found a {type(found).__name__}"
    except Refused as error:
        raise CheckpointMismatch(f"{file}: a pickle that {error}, which is refused unread") from None
    except Exception as error:  # a broken pickle can fail anywhere
        if as_os_error(error) is not None:
            raise
        said = f"found a broken one ({type(error).__name__})"
    raise CheckpointDamaged(f"{file}: expected the metadata of a torch distributed checkpoint, {said}")
