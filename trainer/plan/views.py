"""The ranks as grids with named axes. A view is one such grid; the same ranks may appear in several.

    dense    pp x dp_replicate x dp_shard x cp x tp      every parameter but experts
    experts  pp x dp_replicate x efsdp x ep              stacked experts, where `parallel.ep` divides them

    efsdp * ep = dp_shard * cp * tp: the factor that ep leaves divides each expert's parameters.

A parameter names its view (`trainer.model.roles`). An axis' module in `trainer.axes` defines it; here is the part that
the plan needs. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

DENSE, EXPERT = "dense", "experts"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """name: of the mesh axis and, under `parallel`, of its degree's key. views: the views that contain it. text: text
    for a degree of more than one in the plan.

    reads: its ranks read different sequences. copies: they hold full copies of the same parameters. shards: they hold
    shards of the same parameters (FSDP). joint: they compute one thing together, from one random stream.
    """

    name: str
    text: str
    views: tuple[str, ...] = (DENSE,)
    reads: bool = False
    copies: bool = False
    shards: bool = False
    joint: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """axes: from outer to inner, each with its degree; the product is the world size."""

    name: str
    axes: tuple[tuple[Axis, int], ...]

    @property
    def degrees(self) -> dict[str, int]:
        return {axis.name: size for axis, size in self.axes}

    def size(self, which: Callable[[Axis], bool]) -> int:
        """Number of ranks that differ along the axes that satisfy the condition."""
        return prod(size for axis, size in self.axes if which(axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's index on each axis; the innermost varies fastest."""
        place: dict[str, int] = {}
        for axis, size in reversed(self.axes):
            rank, place[axis.name] = divmod(rank, size)
        return place

    def place(self, rank: int, which: Callable[[Axis], bool]) -> int:
        """A rank's index among the ranks that differ along the axes that satisfy the condition."""
        coordinates, index = self.coordinates(rank), 0
        for axis, size in self.axes:
            if which(axis):
                index = index * size + coordinates[axis.name]
        return index

    @property
    def sharding(self) -> tuple[str, ...]:
        """The axes along which FSDP divides a parameter of this view: at least one, even if it has one rank."""
        axes = [(axis.name, size) for axis, size in self.axes if axis.shards]
        return tuple(name for name, size in axes if size > 1) or (axes[0][0],)

    @property
    def copying(self) -> tuple[str, ...]:
        """The axes whose ranks hold identical copies of a parameter of this view."""
        return tuple(axis.name for axis, size in self.axes if axis.copies and size > 1)

    @property
    def shards(self) -> int:
        """Number of ranks that FSDP divides a parameter of this view over."""
        return self.size(lambda axis: axis.shards)

    @property
    def holders(self) -> int:
        """Number of ranks that hold one parameter of this view, whole or in shards: FSDP averages its gradient over
        them."""
        return self.size(lambda axis: axis.shards or axis.copies)

    @property
    def is_sharded(self) -> bool:
        """Whether an axis divides the parameters, or the ranks that hold them."""
        return any(size > 1 and not axis.copies for axis, size in self.axes)

    def resized(self, degree: Callable[[Axis], int | None]) -> View:
        """This view with other degrees; None keeps a degree."""
        return View(self.name, tuple((axis, degree(axis) or size) for axis, size in self.axes))

    def __str__(self) -> str:
        return " x ".join(f"{axis.name} {size}" for axis, size in self.axes if size > 1) or "1"
