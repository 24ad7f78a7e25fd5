"""Schedules that hold every micro-batch of a step: a few are replayed, and the rest follows in closed form.

    gpipe, 512 micro-batches      F F F F ... F F F F  B B B B ... B B B B
                                  replayed     replayed         replayed      with 6, 8 and 10 micro-batches

From one micro-batch to the next the held bytes grow by the same amount, and each place in the step, counted from its
ends, holds as many more bytes as there are more micro-batches. Two replays give that amount, and a third checks it:
where it differs by a byte, nothing is concluded and the whole step is replayed. The allocated bytes are exact. The
reserved bytes above them are those of a replay with the same peak, within 0.5 % of the whole step's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from trainer.axes.pipeline.orders import Action
from trainer.estimate.allocator import ALIGN
from trainer.estimate.layouts.common import Setting
from trainer.estimate.timeline import Moment, Timeline

REPLAYED = (6, 8, 10)
"""The numbers of micro-batches in the replays."""
KEPT = REPLAYED[0] // 2
"""Places at each end of a run of actions."""

LONG = 32
"""The most micro-batches of a step that is replayed whole."""

Place = tuple[Moment, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """Two steps with a few micro-batches."""

    order: Sequence[Action]
    timeline: Timeline
    setting: Setting


def repeats_only(order: Sequence[Action], count: int) -> bool:
    """Whether the order only does each thing once for all micro-batches, and for too many to replay."""
    return count > LONG and all(length == count for _, length in _runs(order))


def continued(play: Callable[[int], Replayed], count: int) -> tuple[Timeline, Setting] | None:
    """Two steps with `count` micro-batches, without the middle of each run of actions in the curve; None where they do
    not follow. play: replays two steps with so many."""
    played = list(map(play, REPLAYED))
    places = [_places(one) for one in played]
    if not all(map(_grows_evenly, places[-1][1])):
        return None
    lines = _Lines(count)
    try:
        curve = [
            lines.moment(same)
            for place in zip(*(ends for ends, _ in places), strict=True)
            for same in zip(*place, strict=True)
        ]
        host = lines.each([one.setting.host for one in played])
        nvme = lines.each([one.setting.nvme for one in played])
        allocated = lines.follow([one.timeline.allocated for one in played])
    except ValueError:
        return None
    ends = [[moment.total for place in each for moment in place] for each, _ in (places[0], places[-1])]
    leading = _leading([moment.total for moment in curve], *ends)
    longest = played[-1].timeline if leading == REPLAYED[-1] else play(min(leading + 2, count)).timeline
    # The reserved bytes that are not allocated at the peak do not grow.
    reserved = max(moment.total for moment in curve) + longest.peak_reserved - longest.peak.total
    highest = lines.highest([one.timeline.highest for one in played], curve)
    timeline = Timeline.of(curve, highest=highest, allocated=allocated, reserved=-(-reserved // ALIGN) * ALIGN)
    setting = played[-1].setting
    return timeline, replace(setting, timeline=timeline, host=host, nvme=nvme)


def _leading(wanted: Sequence[int], first: Sequence[int], last: Sequence[int]) -> int:
    """From how many micro-batches on the place of the peak is the one that is highest in the end."""
    few, many = REPLAYED[0], REPLAYED[-1]
    top, count = wanted.index(max(wanted)), many

    def ahead(place: int) -> bool:
        """Whether a place is above the last one still, in `count` micro-batches."""
        above, lost = last[place] - last[top], (last[top] - first[top]) - (last[place] - first[place])
        return above * (many - few) > lost * (count - many)

    for place in range(len(wanted)):
        while ahead(place):
            count += 1
    return count


class _Lines:
    """Values that grow by the same amount with each micro-batch. Raises ValueError for others."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted

    def follow(self, values: Sequence[int]) -> int:
        (first, second, third), (one, two, three) = values, REPLAYED
        if (second - first) * (three - two) != (third - second) * (two - one):
            raise ValueError("no line")
        grown = (third - first) * (self.wanted - three)
        if grown % (three - one):
            raise ValueError("no whole bytes")
        return third + grown // (three - one)

    def each(self, named: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return {name: self.follow([one[name] for one in named]) for name in named[0]}

    def highest(self, found: Sequence[Sequence[int]], curve: Sequence[Moment]) -> list[int]:
        """Of each component its own maximum; at least that of the curve, where another place gets ahead."""
        most = [max(sizes) for sizes in zip(*(moment.parts for moment in curve), strict=True)]
        for index, values in enumerate(zip(*found, strict=True)):
            with suppress(ValueError):
                most[index] = max(most[index], self.follow(values))
        return most

    def moment(self, moments: Sequence[Moment]) -> Moment:
        if len({(moment.step, moment.phase) for moment in moments}) > 1:
            raise ValueError("another phase")
        parts = tuple(self.follow(each) for each in zip(*(moment.parts for moment in moments), strict=True))
        return Moment(moments[0].step, moments[0].phase, self.follow([moment.total for moment in moments]), parts)


def _runs(order: Sequence[Action]) -> list[tuple[tuple[str, int], int]]:
    """The repeated actions, and how often they repeat."""
    grouped = groupby(order, key=lambda action: (action.kind, action.stage))
    return [(what, sum(1 for _ in actions)) for what, actions in grouped]


def _places(one: Replayed) -> tuple[list[Place], list[list[Place]]]:
    """The curve, cut at the actions: the places at both ends of each run of actions, and those between."""
    marks = [*one.timeline.marks, len(one.timeline.curve)]
    cut = iter([tuple(one.timeline.curve[begin:end]) for begin, end in pairwise(marks)])
    ends, middles = [tuple(one.timeline.curve[: marks[0]])], list[list[Place]]()
    for _ in range(len(one.timeline.marks) // len(one.order)):
        for _, length in _runs(one.order):
            run = [next(cut) for _ in range(length)]
            ends += [*run[:KEPT], *run[length - KEPT :]]
            middles.append(run[KEPT - 1 : length - KEPT + 1])
    return ends, middles


def _grows_evenly(run: Sequence[Place]) -> bool:
    """Whether everything grows by the same amount from one micro-batch to the next."""
    if len({len(place) for place in run}) > 1:
        return False
    lines = (values for same in zip(*run, strict=True) for values in zip(*(one.parts for one in same), strict=True))
    return all(len({after - before for before, after in pairwise(line)}) == 1 for line in lines)
