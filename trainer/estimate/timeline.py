"""Memory over time: allocations and frees by component, and the moment at which they are highest.

timeline.phase("forward", step=1)
handle = timeline.allocate("activations", 4096)
timeline.free(handle)
timeline.peak                     bytes, component by component, phase and step of the highest moment
timeline.highest                  bytes of each component at its own highest moment
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.estimate.allocator import Block, CudaAllocator, ExpandableAllocator, PlainAllocator

COMPONENTS = ("parameters", "gradients", "optimizer", "activations", "loss", "buffers", "workspace")
"""optimizer: states and master copies. buffers: communication, gathered and cast parameters. loss: the head's output
and what the loss makes of it. workspace: temporaries of the backward and of the update, libraries' scratch memory."""
_INDEX = {name: index for index, name in enumerate(COMPONENTS)} | {
    "casts": COMPONENTS.index("buffers"),
    "gradients of the update": COMPONENTS.index("gradients"),
    "optimizer states": COMPONENTS.index("optimizer"),
}

COMPUTE, GATHER, REDUCE = 0, 1, 2
"""Streams. Memory that one frees is not available to another."""

Handle = tuple[int, int, Block]


@dataclass(frozen=True, slots=True)
class Moment:
    """total: bytes allocated; parts: in the order of COMPONENTS."""

    step: int
    phase: str
    total: int
    parts: tuple[int, ...]


class Timeline:
    """Replays one rank's step. gpu: with the CUDA allocator's rounding and segments, expandable or not; else plain
    bytes. `peak` and `curve` know of everything up to the last `sample`. marks: places in the curve."""

    def __init__(self, *, gpu: bool, expandable: bool = False) -> None:
        self._allocator = (ExpandableAllocator() if expandable else CudaAllocator()) if gpu else PlainAllocator()
        self._parts = [0] * len(COMPONENTS)
        self._highest = [0] * len(COMPONENTS)
        self._now = ("start", 0)
        self._high, self._high_parts = 0, tuple(self._parts)
        self.peak = Moment(0, "start", 0, self._high_parts)
        self.curve: list[Moment] = []
        self.marks: list[int] = []

    @classmethod
    def of(cls, curve: list[Moment], *, highest: Sequence[int], allocated: int, reserved: int) -> Timeline:
        """One of a GPU that has been replayed elsewhere."""
        made, played = cls(gpu=True), CudaAllocator()
        played.allocated, played.reserved = allocated, reserved
        made._allocator, made._highest = played, list(highest)
        made.curve, made.peak = curve, max(curve, key=lambda moment: moment.total)
        return made

    @property
    def allocated(self) -> int:
        return self._allocator.allocated

    @property
    def cuts_exactly(self) -> bool:
        """Whether a request always takes its own size, wherever its block is cut from: with expandable segments."""
        return isinstance(self._allocator, ExpandableAllocator)

    @property
    def highest(self) -> tuple[int, ...]:
        """Of each component, in the order of COMPONENTS: the most that it ever held, each at a moment of its own."""
        return tuple(self._highest)

    @property
    def peak_reserved(self) -> int:
        """Bytes reserved: CUDA's segments stay; host memory is reserved as it is allocated."""
        return self._allocator.reserved if isinstance(self._allocator, CudaAllocator) else self.peak.total

    def phase(self, name: str, step: int) -> None:
        self.sample()
        self._now = (name, step)

    def sample(self) -> None:
        """Add the highest moment since the last sample to the curve."""
        if self._high:
            self.curve.append(Moment(self._now[1], self._now[0], self._high, self._high_parts))
            if self._high > self.peak.total:
                self.peak = self.curve[-1]
        self._high = 0

    def mark(self) -> None:
        """Remember the current end of the curve."""
        self.marks.append(len(self.curve))

    def allocate(self, component: str, size: int, stream: int = COMPUTE) -> Handle | None:
        """A handle of an allocation; None for no bytes."""
        if size <= 0:
            return None
        allocator, index, parts = self._allocator, _INDEX[component], self._parts
        block = allocator.malloc(size, stream)
        held = block.size
        parts[index] += held
        if parts[index] > self._highest[index]:
            self._highest[index] = parts[index]
        if allocator.allocated > self._high:
            self._high, self._high_parts = allocator.allocated, tuple(parts)
        return index, held, block

    def free(self, handle: Handle | None) -> None:
        if handle is not None:
            index, held, block = handle
            self._parts[index] -= held
            self._allocator.free(block)

    def free_all(self, held: list[Handle | None] | dict[Any, Handle | None]) -> None:
        """Free these handles and forget them."""
        for handle in held.values() if isinstance(held, dict) else held:
            self.free(handle)
        held.clear()

    def move(self, handle: Handle | None, component: str) -> Handle | None:
        """Count a storage under another component from here on."""
        if handle is None:
            return None
        index, held, block = handle
        to, parts = _INDEX[component], self._parts
        parts[index] -= held
        parts[to] += held
        self._highest[to] = max(self._highest[to], parts[to])
        return to, held, block
