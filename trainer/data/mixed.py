"""Samples of several sources in one order: which source has which position of the run, and its own position there.

    weights 3 : 7      round of 10 turns    w c w w c w w w c w  |  w c w ...        c: code, w: web
    position 14        turn 4 of round 1: the source is c, its own position 1 * 3 + 1 = 4     all counted from 0

A turn goes to the source that is furthest behind its share (largest deficit first, as in Megatron's blended data sets):
no source is ever a whole sample ahead of its share, and after each round all have exactly theirs. Nothing is random and
nothing is stored: the order is a function of the position, the same under every layout and after every resume. Each
source keeps its own order.

Without weights the samples of all sources are numbered consecutively and shuffled as one (`Numbered`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import Batch
from trainer.data.loader import Opened, OrderedSamples, Reading, Source
from trainer.data.mixture import Part, shares
from trainer.data.positions import Order
from trainer.data.samples import Samples

Numbers = NDArray[np.int64]
CHUNK = 2**20
"""Number of positions that are looked up at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """shares: turns of each source in a round."""

    shares: tuple[int, ...]

    def __call__(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """The source of each position, and the position in that source."""
        table, before = _round(self.shares)
        rounds, turns = np.divmod(positions, len(table))
        sources = table[turns]
        return sources, rounds * np.array(self.shares)[sources] + before[turns]

    def between(self, positions: range) -> list[int]:
        """Number of these positions in each source."""
        ends = zip(self._before(positions.start), self._before(positions.stop), strict=True)
        return [stop - start for start, stop in ends]

    def _before(self, positions: int) -> list[int]:
        table, _ = _round(self.shares)
        rounds, turns = divmod(positions, len(table))
        some = np.bincount(table[:turns], minlength=len(self.shares)).tolist()
        return [rounds * share + more for share, more in zip(self.shares, some, strict=True)]

    def position_of(self, source: int, number: int) -> int:
        """The position at which a source has its sample `number`, from 0."""
        table, _ = _round(self.shares)
        rounds, place = divmod(number, self.shares[source])
        return rounds * len(table) + int(np.flatnonzero(table == source)[place])

    def until_exhausted(self, counts: Sequence[int | None]) -> int | None:
        """Positions before the one at which the first source is exhausted. counts: None: it has no end."""
        ends = [self.position_of(source, count) for source, count in enumerate(counts) if count is not None]
        return min(ends, default=None)


@lru_cache
def _round(shares: tuple[int, ...]) -> tuple[Numbers, Numbers]:
    """The source of each turn, and its number of earlier turns in the round."""
    total, lacking, had = sum(shares), [0] * len(shares), [0] * len(shares)
    table, before = np.empty(total, np.int64), np.empty(total, np.int64)
    for turn in range(total):
        lacking = [lack + share for lack, share in zip(lacking, shares, strict=True)]
        source = lacking.index(max(lacking))
        table[turn], before[turn] = source, had[source]
        lacking[source] -= total
        had[source] += 1
    return table, before


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbered:
    """`Samples` of all sources, numbered consecutively: those of the first source, then those of the second, and so
    on."""

    parts: tuple[Samples, ...]

    @property
    def counts(self) -> list[int]:
        return [part.count or 0 for part in self.parts]

    @property
    def count(self) -> int:
        return sum(self.counts)

    def sources(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """The source of each number, and the number in that source."""
        begins = np.cumsum([0, *self.counts])
        sources = np.searchsorted(begins, numbers, side="right") - 1
        return sources, numbers - begins[sources]

    def between(self, order: Order, positions: range) -> list[int]:
        """Number of these positions in each source. In a whole epoch that is all its samples."""
        epochs, rest = divmod(len(positions), self.count)
        some = np.arange(positions.stop - rest, positions.stop, dtype=np.int64)
        more = np.zeros(len(self.parts), np.int64)
        for begin in range(0, rest, CHUNK):
            sources, _ = self.sources(order(some[begin : begin + CHUNK]))
            more += np.bincount(sources, minlength=len(self.parts))
        return [epochs * count + int(also) for count, also in zip(self.counts, more, strict=True)]

    def read(self, numbers: Numbers) -> Batch:
        return gather(*self.sources(numbers), [part.read for part in self.parts])


@dataclass(frozen=True, kw_only=True, slots=True)
class InTurn:
    """`Samples` of several sources in turn, as many as there are before the first source is exhausted."""

    parts: tuple[Samples, ...]
    turns: Turns

    @property
    def count(self) -> int | None:
        return self.turns.until_exhausted([part.count for part in self.parts])

    def read(self, numbers: Numbers) -> Batch:
        return gather(*self.turns(numbers), [part.read for part in self.parts])


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """`Reading` of several sources with weights, by their names."""

    parts: Mapping[str, Reading]
    turns: Turns

    @property
    def in_order(self) -> bool:
        return any(part.in_order for part in self.parts.values())

    def open(self, mark: Any = None) -> OpenMixed:
        return OpenMixed(
            parts={name: part.open((mark or {}).get(name)) for name, part in self.parts.items()}, turns=self.turns
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenMixed:
    """Each source gets requests for its own positions, in order, and keeps its own mark."""

    parts: Mapping[str, Opened]
    turns: Turns

    def at(self, positions: Numbers) -> Batch:
        return gather(*self.turns(positions), [part.at for part in self.parts.values()])

    def mark(self) -> dict[str, Any]:
        return {name: mark for name, part in self.parts.items() if (mark := part.mark())}


def blend(parts: Sequence[Part], sources: Sequence[Source], *, seed: int) -> Source:
    """Sources as one: in turn by their weights, or without weights all samples shuffled together."""
    if not parts[0].name:
        return sources[0]
    weights = [part.weight for part in parts if part.weight is not None]
    if weights:
        turns = Turns(shares=tuple(shares(weights)))
        readings = {part.name: source.reading for part, source in zip(parts, sources, strict=True)}
        reading, counts = Mixed(parts=readings, turns=turns), turns.between
        validation: Samples = InTurn(parts=tuple(source.validation for source in sources), turns=turns)
        until, how = turns.until_exhausted([source.count for source in sources]), ":".join(map(str, turns.shares))
    else:
        # Sources whose samples have no numbers have been refused.
        numbered = Numbered(
            parts=tuple(each.reading.samples for each in sources if isinstance(each.reading, OrderedSamples))
        )
        order = Order(count=numbered.count, seed=seed, shuffle=parts[0].config.data.shuffle)
        reading, counts = OrderedSamples(samples=numbered, order=order), partial(numbered.between, order)
        validation = Numbered(parts=tuple(source.validation for source in sources))
        until, how = numbered.count, "by size"
    names = [part.name for part in parts]
    same = [(part.config.data.shuffle, part.config.data.packing) for part in parts]
    digest = hashlib.sha256(repr([same, [source.fingerprint for source in sources]]).encode()).hexdigest()

    def text(count: int, steps: int) -> str:
        each = [f"mixture of {len(parts)} sources, {how}"]
        for name, source, own in zip(names, sources, counts(range(count)), strict=True):
            each.append(f"{'':11}{name} {own / max(1, count):.3g} of the samples: {source.text(own, steps)}")
        return "\n".join(each)

    return Source(
        tokenizer=sources[0].tokenizer,
        reading=reading,
        validation=validation,
        count=None if any(source.count is None for source in sources) else sum(source.count or 0 for source in sources),
        fingerprint=f"{','.join(names)} {how} {digest}",
        text=text,
        parts=lambda positions: dict(zip(names, counts(positions), strict=True)),
        until_exhausted=until,
    )


def gather(sources: Numbers, numbers: Numbers, readers: Sequence[Callable[[Numbers], Batch]]) -> Batch:
    """One batch of samples of several sources. sources, numbers: of each row."""
    rows = {int(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
    batches = {source: readers[source](numbers[where]) for source, where in rows.items()}
    if len(batches) == 1:
        return next(iter(batches.values()))
    order = torch.from_numpy(np.argsort(np.concatenate(list(rows.values()))))

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(tensors))[order]

    found = list(batches.values())
    positions = [batch.position_ids for batch in found if batch.position_ids is not None]
    lengths = [_lengths(batch) for batch in found] if any(batch.lengths is not None for batch in found) else []
    return Batch(
        joined([batch.input_ids for batch in found]),
        joined([batch.labels for batch in found]),
        joined(positions) if positions else None,
        joined(lengths) if lengths else None,
    )


def _lengths(batch: Batch) -> torch.Tensor:
    """For a source that never fills up a sample: all of it."""
    full = torch.full((len(batch.input_ids),), batch.input_ids.shape[1], dtype=torch.int64)
    return full if batch.lengths is None else batch.lengths
