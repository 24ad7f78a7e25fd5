"""Tensors in safetensors files: written by each rank for its part, read by any rank through a memory map.

safetensors is JSON and raw bytes: nothing in it can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.errors import CheckpointDamaged
from trainer.checkpoint.manifest import FileEntry, Manifest, check_missing, entry_of
from trainer.process.disks import as_os_error
from trainer.process.files import sync

FILE_BYTES = 2 * 10**9
"""A rank gathers tensors up to this size before it writes a file: the host memory of a save."""


class RankWriter:
    """The files of one rank. After a disk error it accepts tensors and drops them, because the other ranks need this
    one in the collectives that gather them."""

    def __init__(self, folder: Path, rank: int, *, file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._rank, self._file_bytes = folder, rank, file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self.files: dict[str, FileEntry] = {}
        self.tensors: dict[str, str] = {}
        self.error: OSError | None = None
        self.bytes = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """tensor: on the CPU; must not change until the file is written."""
        self.bytes += tensor.nbytes
        held = sum(other.nbytes for other in self._pending.values())
        if self._pending and held + tensor.nbytes > self._file_bytes:
            self.flush()
        self._pending[key] = tensor.contiguous()

    def flush(self) -> None:
        """Write the pending tensors as one file and flush it. Stores a disk error in `error`."""
        pending, self._pending = self._pending, {}
        if not pending or self.error is not None:
            return
        name = f"rank-{self._rank:05d}-{len(self.files):03d}.safetensors"
        try:
            save_file(pending, self._folder / name)
            sync(self._folder / name)
            self.files[name] = entry_of(self._folder / name)
        except (SafetensorError, OSError) as error:
            self.error = as_os_error(error) or OSError(0, str(error))
        self.tensors.update(dict.fromkeys(pending, name))


class TensorReader:
    """Tensors of a checkpoint by key. Only accessed parts are read: a slice of a large tensor costs a slice."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._open: dict[str, safe_open] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._manifest.tensors

    def names(self) -> list[str]:
        return list(self._manifest.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        with self._promised(key):
            return tuple(self._file(key).get_slice(key).get_shape())

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU, mapped from the file; read-only.

        Raises CheckpointDamaged if the file lacks a tensor of the manifest.
        """
        with self._promised(key):
            return self._file(key).get_tensor(key)

    @contextmanager
    def _promised(self, key: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise CheckpointDamaged(f"{self._folder}: expected the tensor {key}, found {error}") from None

    def _file(self, key: str) -> safe_open:
        if key not in self._manifest.tensors:
            raise CheckpointDamaged(f"{self._folder}: expected the tensor {key}, found none of that name")
        name = self._manifest.tensors[key]
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                if (refusal := as_os_error(error)) is not None:
                    check_missing(self._folder / name, refusal)
                raise CheckpointDamaged(f"{self._folder / name}: expected safetensors, found {error}") from None
        return self._open[name]
