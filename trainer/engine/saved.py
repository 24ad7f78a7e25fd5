"""A checkpoint as an engine sees it: tensors by key, equal under every layout, and the rank that writes each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

BUFFER = "buffer"
"""Kind of tensors that belong to a model but are not trained."""


class Saved(Protocol):
    """The tensors of a checkpoint by key. `trainer.checkpoint.tensors.TensorReader` reads them from files."""

    def __contains__(self, key: str) -> bool: ...

    def names(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU; read-only."""
        ...


class Dealer:
    """Assigns each tensor to the holder with the fewest bytes so far. Every rank that assigns the same sizes gets the
    same result without communication."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._bytes = dict.fromkeys(ranks, 0)

    def owner(self, size: int) -> int:
        """The rank that writes a tensor of this many bytes."""
        rank = min(self._bytes, key=lambda rank: self._bytes[rank])
        self._bytes[rank] += size
        return rank


def write_buffers(buffers: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, under their checkpoint keys."""
    yield from ((f"{BUFFER}/{name}", buffer) for name, buffer in buffers.items())


def read_buffer(saved: Saved, name: str) -> torch.Tensor | None:
    return saved.read(key) if (key := f"{BUFFER}/{name}") in saved else None
