"""Changes that make a plan fit, and the largest micro-batch of a plan that fits: each with its own estimate.

The smallest change comes first: the one with the fewest keys, and of several the one that costs least speed. Each is
given as overrides to append to the command. If no single one is enough, two are tried together, then three; only then
as many as help, without those that prove unnecessary. Five are never suggested where two are enough.
A change that alters the run (other moments, adapters) is named where no other single change is enough. The smallest
number of nodes on which the layout fits unchanged comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, prod
from typing import Any

from configs.choices import BYTES, EngineName
from configs.errors import CookbookError
from configs.keys import as_text, set_value
from configs.schema import Config
from trainer.axes import PIPELINE
from trainer.estimate.bounds import states_bytes
from trainer.estimate.changes import Change, changes
from trainer.estimate.estimate import Estimate, estimate, with_micro_batch
from trainer.estimate.profile import ModelProfile, Trace
from trainer.estimate.profiles import get_profile
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

ENOUGH = 3  # single changes that are shown
TOGETHER = (2, 3)  # as many changes at once are tried in every combination
TRIED = 8  # combinations of one size that are estimated: those that should be enough and lose the least speed
ALIKE = 0.9  # two changes leave at least this part of the memory that their separate effects predict
MORE_NODES = 6  # doublings
LARGEST = 4096
LINES = 8  # sizes whose largest is looked for by lines
ALONE = 1  # shape of a change that is traced by itself: a second request would bring others


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """overrides: to append to the command. why: what they do, in a few words."""

    overrides: tuple[str, ...]
    why: str
    estimate: Estimate


def suggest(
    config: Config, plan: Plan, machine: Machine, before: Estimate, *, found_gpu: str | None = None
) -> list[Suggestion]:
    """The smallest changes that make a plan fit. before: its estimate. Empty: no known change does.

    If nothing makes it fit, the changes that make it tight are named.
    """
    search = _Search(config, plan, machine, before, found_gpu)
    found = search.single(alters=False)
    if not found:
        found = search.together() or search.all_that_help()
        found += search.single(alters=True)
    return [*(found or search.tight()), *search.more_nodes()]


class _Search:
    """tried: the changes that were estimated, by their keys; None: refused, or too large in a bound."""

    def __init__(self, config: Config, plan: Plan, machine: Machine, before: Estimate, found_gpu: str | None) -> None:
        self.config, self.plan, self.machine, self.before, self.found_gpu = config, plan, machine, before, found_gpu
        self.every = changes(config, plan)
        self.changes = [change for change in self.every if not change.alters]
        self.tried: dict[frozenset[str], Suggestion | None] = {}

    def single(self, *, alters: bool) -> list[Suggestion]:
        """Up to ENOUGH changes that are enough alone."""
        found: list[Suggestion] = []
        for change in [change for change in self.every if change.alters is alters]:
            if len(found) < ENOUGH and (one := self.fitting([change])) is not None:
                found.append(one)
        return found

    def together(self) -> list[Suggestion]:
        """The smallest set of several changes that is enough."""
        for size in TOGETHER:
            sets = [
                some
                for some in combinations(self.changes, size)
                if len({key for change in some for key in change.keys}) == sum(len(change.keys) for change in some)
            ]
            sets = [some for some in sets if ALIKE * self._left(some) <= (self.before.device.capacity_bytes or inf)]
            sets.sort(key=self._promise)
            for some in [some for some in sets if self._allowed(some)][:TRIED]:
                if (found := self.fitting(some)) is not None:
                    return [self._needed(some, found)]
        return []

    def _promise(self, some: Sequence[Change]) -> tuple[bool, int, int]:
        """Sets in the order of trial: those that should be enough, then those with the fewest keys, then those that
        lose the least speed."""
        rank, known = self.before.busiest, all(self._part(change) for change in some)
        aside = rank.device_most_bytes - rank.peak_allocated_bytes  # more than these will have
        enough = known and self._left(some) + aside <= (self.before.device.capacity_bytes or inf)
        return not enough, sum(len(one.keys) for one in some), sum(one.slowdown for one in some)

    def all_that_help(self) -> list[Suggestion]:
        """Add changes from the fastest to the slowest until they are enough, then drop those that are not needed."""
        chosen: list[Change] = []
        for change in sorted(self.changes, key=lambda one: one.slowdown):
            # A stronger form of a change replaces it.
            stronger = [earlier for earlier in chosen if not earlier.keys.keys() <= change.keys.keys()] + [change]
            if not self._allowed(stronger):
                continue  # every later set would be refused with it too
            chosen = stronger
            if len(chosen) > 1 and (found := self.fitting(chosen)) is not None:
                return [self._needed(chosen, found)]
        return []

    def _needed(self, chosen: Sequence[Change], found: Suggestion) -> Suggestion:
        """Drop each change, the slowest first, without which the plan still fits."""
        for change in sorted(chosen, key=lambda one: -one.slowdown):
            fewer = [one for one in chosen if one is not change]
            if fewer and (less := self.fitting(fewer)) is not None:
                chosen, found = fewer, less
        return found

    def tight(self) -> list[Suggestion]:
        """Of all that was tried, the smallest changes whose lower end fits."""
        near = [one for one in self.tried.values() if one is not None and not one.estimate.too_large]
        return sorted(near, key=lambda one: len(one.overrides))[:ENOUGH]

    def more_nodes(self) -> list[Suggestion]:
        """The layout unchanged on the fewest nodes on which it fits, where more nodes divide it further."""
        zero = self.plan.engine is EngineName.deepspeed and self.plan.zero_stage > 0
        if self.plan.world_size == 1 or not (zero or self.plan.fully_sharded):
            return []
        nodes, size = self.config.cluster.nodes, inf
        for doubling in range(1, MORE_NODES + 1):
            found = self._on(nodes << doubling)
            if found is not None and found.estimate.fits:
                return [self._fewest(nodes << (doubling - 1), nodes << doubling, found)]
            if found is not None:
                now = found.estimate.busiest.device_bytes
                if now >= size:
                    return []
                size = now
        return []

    def _fewest(self, low: int, high: int, found: Suggestion) -> Suggestion:
        while high - low > 1:
            middle = (low + high) // 2
            there = self._on(middle)
            if there is not None and there.estimate.fits:
                high, found = middle, there
            else:
                low = middle
        return found

    def _on(self, nodes: int) -> Suggestion | None:
        keys = {"cluster.nodes": nodes}
        change = Change(why=f"this layout on {nodes} nodes", keys=keys, touched=frozenset(), slowdown=0)
        return self._try([change])

    def fitting(self, some: Sequence[Change]) -> Suggestion | None:
        """The suggestion of these changes together, if it fits."""
        keys = frozenset(f"{key}={value}" for change in some for key, value in change.keys.items())
        if keys not in self.tried:
            enough = self._left(some, measured=False) <= (self.before.device.capacity_bytes or inf)
            self.tried[keys] = self._try(some) if enough else None
        found = self.tried[keys]
        return found if found is not None and found.estimate.fits else None

    def _left(self, some: Sequence[Change], *, measured: bool = True) -> float:
        """A lower bound: the components that no change touches, and of the others the measured part that each
        change left where it was tried alone."""
        outside = self.before.context_bytes + self.before.nccl_bytes
        parts = [self._part(change) if measured else {} for change in some]
        sizes: list[float] = []
        for rank in self.before.ranks:
            left = 0.0
            for name, size in rank.components.items():
                touching = [
                    part.get(name, 0.0) for change, part in zip(some, parts, strict=True) if name in change.touched
                ]
                left += size * prod(touching)
            sizes.append(left)
        return max(sizes) + outside

    def _part(self, change: Change) -> dict[str, float]:
        """Of each component of the busiest rank, the part that a change leaves; empty where it was not tried."""
        alone = self.tried.get(frozenset(f"{key}={value}" for key, value in change.keys.items()))
        if alone is None:
            return {}
        before, after = self.before.busiest, alone.estimate.busiest
        return {
            name: min(1.0, after.components[name] / before.components[name]) if before.components[name] else 1.0
            for name in before.components
        }

    def _try(self, some: Sequence[Change]) -> Suggestion | None:
        """The estimate with the changes; None where they do not go with the rest of the configuration, leave states
        that do not fit, or are not enough for the busiest place of the pipeline without them."""
        before, found_gpu = self.before, self.found_gpu
        keys = {key: value for change in some for key, value in change.keys.items()}
        changed = _changed(self.config, keys)
        try:
            plan = make_plan(changed, self.machine)
            known = changed.tuning == self.config.tuning  # the number of trained parameters is the same
            states = _states(changed, plan, before, self.config.parallel.tp or 1) if known else 0
            if states > (before.device.capacity_bytes or inf):
                return None
            if plan.degree(PIPELINE) > 1:
                place = min(before.busiest_place, plan.degree(PIPELINE) - 1)
                if not estimate(changed, plan, found_gpu=found_gpu, places=[place], alone=ALONE).fits:
                    return None
            found = estimate(changed, plan, found_gpu=found_gpu, heaviest=True, alone=ALONE)
        except CookbookError:
            return None
        overrides = tuple(f"{key}={as_text(value)}" for key, value in keys.items())
        return Suggestion(overrides=overrides, why=" + ".join(change.why for change in some), estimate=found)

    def _allowed(self, some: Sequence[Change]) -> bool:
        """Whether there is a plan with these changes."""
        try:
            make_plan(_changed(self.config, {k: v for change in some for k, v in change.keys.items()}), self.machine)
        except CookbookError:
            return False
        return True


def largest_micro_batch(
    config: Config, plan: Plan, *, first: Estimate | None = None, found_gpu: str | None = None
) -> int | None:
    """The largest micro-batch size that fits; None when the trace does not grow evenly with it. first: the plan's own
    estimate, where it is known.

    Storages are traced for two sizes; where they are the same ones, each grows linearly between and beyond.
    """
    first = first or estimate(config, plan, found_gpu=found_gpu)
    if not first.fits or first.device.capacity_bytes is None:
        return None
    here, gpu = plan.batch.micro_batch_size, first.device.gpu
    # A single sequence may take another code path than several, so it is not extrapolated from.
    for traced in (here, here + 1):
        smaller = first.profile if traced == here else get_profile(config, plan, gpu, micro_batch_size=traced)
        larger = get_profile(config, plan, gpu, micro_batch_size=traced + 1)
        if _extrapolate(smaller, larger, 1) is not None:
            break
    else:
        return None

    def sized(size: int, places: Sequence[int] | None) -> Estimate:
        profile = _extrapolate(smaller, larger, size - traced)
        assert profile is not None
        grown = with_micro_batch(plan, size)
        return estimate(config, grown, found_gpu=found_gpu, profile=profile, places=places, heaviest=True)

    def largest(places: Sequence[int] | None) -> int:
        return _largest_that_fits(first, here, lambda size: sized(size, places))

    if plan.degree(PIPELINE) == 1:
        return largest(None)
    found = largest([first.busiest_place])
    # With another micro-batch another place of the pipeline may be the busiest.
    return found if found == here or sized(found, None).fits else largest(None)


def _largest_that_fits(first: Estimate, here: int, sized: Callable[[int], Estimate]) -> int:
    """first: of micro-batch size `here`, which fits. sized: the estimate of another.

    What a rank holds grows nearly in a line, so the line through the two sizes nearest to the border says which to try.
    Where it misleads, the range is halved.
    """
    capacity = first.device.capacity_bytes or inf
    known = {here: first.busiest.device_most_bytes}
    low, high = here, max(LARGEST, here) + 1
    while high - low > 1:
        guess = 2 * low if len(known) == 1 else (low + high) // 2
        if 1 < len(known) < LINES:
            one, two = sorted(sorted(known, key=lambda size: abs(known[size] - capacity))[:2])
            slope = (known[two] - known[one]) / (two - one)
            guess = one + int((capacity - known[one]) // slope) if slope > 0 else high
        guess = min(max(guess, low + 1), high - 1)
        found = sized(guess)
        known[guess] = found.busiest.device_most_bytes
        low, high = (guess, high) if found.fits else (low, guess)
    return low


def _extrapolate(first: ModelProfile, second: ModelProfile, steps: int) -> ModelProfile | None:
    parts = {}
    for name, part in first.parts.items():
        trace = _extrapolate_trace(part.trace, second.parts[name].trace, steps)
        if trace is None:
            return None
        parts[name] = replace(part, trace=trace)
    return replace(first, parts=parts)


def _extrapolate_trace(first: Trace, second: Trace, steps: int) -> Trace | None:
    sections = {}
    if first.sections.keys() != second.sections.keys():
        return None
    for key, entries in first.sections.items():
        others = second.sections[key]
        if len(entries) != len(others):
            return None
        grown = []
        for entry, other in zip(entries, others, strict=True):
            if entry[0] != "+":
                if entry != other:
                    return None
                grown.append(entry)
            elif entry[1] != other[1]:
                return None
            else:
                grown.append((*entry[:2], entry[2] + steps * (other[2] - entry[2]), entry[3]))
        sections[key] = tuple(grown)
    return Trace(templates=first.templates, sections=sections)


def _changed(config: Config, keys: Mapping[str, Any]) -> Config:
    changed = deepcopy(config)
    for key, value in keys.items():
        set_value(changed, key, value)
    return changed


def _states(config: Config, plan: Plan, before: Estimate, tp: int) -> float:
    """A lower bound that needs no trace. tp: of the estimate before."""
    anatomy = before.profile.outline.anatomy
    trained = sum(parameter.numel for parameter in anatomy.parameters() if parameter.trainable)
    frozen = sum(anatomy.frozen_tensors(BYTES[plan.param_dtype]))
    return states_bytes(plan, trained * tp, config.optimizer, frozen=frozen * tp)
