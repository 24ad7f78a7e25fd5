"""Eight-bit codes of the dynamic map, whose values lie close together near zero (Dettmers et al. 2022, section 2.3).

    value / scale  --nearest of 256 values-->  code          scale: the largest magnitude of a block

A block is up to 256 consecutive values of one row of the whole tensor, so a division between rows falls between blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch

from trainer.optim.adamw_8bit.blocks import BLOCK


@dataclass(frozen=True, slots=True)
class Map:
    """values: values of the codes, ascending. zero: whether a value may be rounded to the first of them."""

    values: torch.Tensor
    zero: bool

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """codes: [rows, blocks, width]. scales: [rows, blocks]."""
        found = self.values.index_select(0, codes.int().reshape(-1)).view(codes.shape)
        return found.mul_(scales.unsqueeze(-1))

    def encode_(self, values: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
        """Write the codes. `values` are overwritten."""
        smallest = torch.finfo(scales.dtype).tiny
        values.div_(scales.clamp(min=smallest).unsqueeze(-1))
        borders = (self.values[:-1] + self.values[1:]) / 2
        if not self.zero:
            borders[0] = -1.0
        codes.copy_(torch.bucketize(values, borders, out_int32=True))


def signed_map(dtype: torch.dtype, device: torch.device) -> Map:
    """Map of the first moment."""
    half = _positive(7)
    values = [-value for value in reversed(half[:-1])] + [0.0] + half
    return Map(torch.tensor(values, dtype=dtype, device=device), zero=True)


def positive_map(dtype: torch.dtype, device: torch.device) -> Map:
    """Map of the second moment. No value is rounded to zero: the update divides by its root."""
    return Map(torch.tensor([0.0, *_positive(8)], dtype=dtype, device=device), zero=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """Columns of a rank's piece with blocks of equal width.

    begin, end: columns of the piece. first: index of their first block in the whole row. width: of each block.
    """

    begin: int
    end: int
    first: int
    width: int

    @property
    def blocks(self) -> int:
        return (self.end - self.begin) // self.width

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """View [rows, blocks, width] of these columns."""
        return rows[:, self.begin : self.end].unflatten(1, (self.blocks, self.width))

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, self.first : self.first + self.blocks]


def slabs(places: Iterable[int]) -> list[Slab]:
    """places: columns of the whole tensor that a rank holds, in its local order."""
    runs: list[list[int]] = []  # begin, end, block, column of the whole after the end
    for at, place in enumerate(places):
        if runs and runs[-1][3] == place and runs[-1][2] == place // BLOCK:
            runs[-1][1], runs[-1][3] = at + 1, place + 1
        else:
            runs.append([at, at + 1, place // BLOCK, place + 1])
    found: list[Slab] = []
    for begin, end, block, _ in runs:
        last = found[-1] if found else None
        follows = last is not None and last.width == end - begin == BLOCK and last.first + last.blocks == block
        if last is not None and follows:
            found[-1] = Slab(begin=last.begin, end=end, first=last.first, width=BLOCK)
        else:
            found.append(Slab(begin=begin, end=end, first=block, width=end - begin))
    return found


def _positive(bits: int) -> list[float]:
    """The map's positive values: seven powers of ten, each with twice as many steps as the one below; and 1."""
    found = [1.0]
    for exponent in range(7):
        steps = 2 ** (exponent + bits - 7)
        edges = [0.1 + 0.9 * step / steps for step in range(steps + 1)]
        found += [10.0 ** (exponent - 6) * (low + high) / 2 for low, high in pairwise(edges)]
    return sorted(found)
