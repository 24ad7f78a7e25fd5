"""The ranks as grids with named axes. A view is one such grid; the same ranks may be seen in several.

    dense    pp x dp_replicate x dp_shard x cp x tp      every parameter but experts
    experts  pp x dp_replicate x efsdp x ep              stacked experts, where `parallel.ep` divides them

    efsdp * ep = dp_shard * cp * tp: what ep leaves over divides each expert's parameters.

A parameter names its view (`trainer.model.roles`). What an axis is says its module in `trainer.axes`; here is what the
plan knows of it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

DENSE, EXPERT = "dense", "experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """name: of the mesh axis and, under `parallel`, of its degree's key. views: which it belongs to. words: of a degree
    of more than one in the plan's text.

    reads: its ranks read different sequences. copies: they hold the same parameters whole. shards: they hold the same
    parameters, which FSDP divides. joint: they compute one thing together, from one random stream.
    """

    name: str
    words: str
    views: tuple[str, ...] = (DENSE,)
    reads: bool = False
    copies: bool = False
    shards: bool = False
    joint: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """axes: from outer to inner, each with its degree; these multiply to the world size."""

    name: str
    axes: tuple[tuple[Axis, int], ...]

    @property
    def degrees(self) -> dict[str, int]:
        return {axis.name: size for axis, size in self.axes}

    def size(self, which: Callable[[Axis], bool]) -> int:
        """Ranks that differ along the axes that are so."""
        return prod(size for axis, size in self.axes if which(axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis; the innermost counts fastest."""
        place: dict[str, int] = {}
        for axis, size in reversed(self.axes):
            rank, place[axis.name] = divmod(rank, size)
        return place

    def place(self, rank: int, which: Callable[[Axis], bool]) -> int:
        """A rank's index among the ranks that differ along the axes that are so."""
        coordinates, index = self.coordinates(rank), 0
        for axis, size in self.axes:
            if which(axis):
                index = index * size + coordinates[axis.name]
        return index

    @property
    def sharding(self) -> tuple[str, ...]:
        """The axes that FSDP divides a parameter of this view along: one at least, though it be of one rank."""
        axes = [(axis.name, size) for axis, size in self.axes if axis.shards]
        return tuple(name for name, size in axes if size > 1) or (axes[0][0],)

    @property
    def copying(self) -> tuple[str, ...]:
        """The axes whose ranks hold a parameter of this view alike."""
        return tuple(axis.name for axis, size in self.axes if axis.copies and size > 1)

    @property
    def shards(self) -> int:
        """Ranks that FSDP divides a parameter of this view over."""
        return self.size(lambda axis: axis.shards)

    @property
    def holders(self) -> int:
        """Ranks that hold one parameter of this view, whole or in shards: FSDP averages its gradient over them."""
        return self.size(lambda axis: axis.shards or axis.copies)

    @property
    def is_sharded(self) -> bool:
        """Whether an axis divides the parameters, or the ranks that hold them."""
        return any(size > 1 and not axis.copies for axis, size in self.axes)

    def resized(self, degree: Callable[[Axis], int | None]) -> View:
        """This view with other degrees; None: as it is."""
        return View(self.name, tuple((axis, degree(axis) or size) for axis, size in self.axes))

    def __str__(self) -> str:
        return " x ".join(f"{axis.name} {size}" for axis, size in self.axes if size > 1) or "1"
