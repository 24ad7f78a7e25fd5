"""What an engine knows of a checkpoint: tensors by key, the same under every layout, and who writes which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

BUFFER = "buffer"
"""Kind of the tensors of a model that are not trained and belong to it all the same."""


class Saved(Protocol):
    """The tensors of a checkpoint by key. `trainer.checkpoint.tensors.TensorReader` reads them from files."""

    def __contains__(self, key: str) -> bool: ...

    def names(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, on the CPU; not to be written to."""
        ...


class Dealer:
    """Assigns each tensor to the holder with the fewest bytes so far. Every rank that deals the same
    sizes comes to the same result without asking the others."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._bytes = dict.fromkeys(ranks, 0)

    def owner(self, size: int) -> int:
        """The rank that is to write a tensor of that many bytes."""
        rank = min(self._bytes, key=lambda rank: self._bytes[rank])
        self._bytes[rank] += size
        return rank


def write_buffers(buffers: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, under the keys that a checkpoint has for them."""
    yield from ((f"{BUFFER}/{name}", buffer) for name, buffer in buffers.items())


def read_buffer(saved: Saved, name: str) -> torch.Tensor | None:
    return saved.read(key) if (key := f"{BUFFER}/{name}") in saved else None
