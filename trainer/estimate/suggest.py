"""What to change so that it fits, and the largest micro-batch when it does: each with its own estimate.

Changes are tried from the cheapest to the dearest in speed; each is given as overrides to append to the command. If no
single one is enough they are added up until one set is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from configs.choices import BYTES, Checkpointing, DType, EngineName, OffloadDevice
from configs.errors import CookbookError
from configs.keys import as_text, set_value
from configs.schema import Config
from trainer.axes import PIPELINE, REPLICATE, TENSOR
from trainer.estimate.bounds import states_bytes
from trainer.estimate.estimate import Estimate, estimate, with_micro_batch
from trainer.estimate.profile import ModelProfile, Trace
from trainer.estimate.profiles import get_profile
from trainer.estimate.timeline import COMPONENTS
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

ENOUGH = 3  # single changes that are shown
LARGEST = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """overrides: words to append to the command. why: what they do, in a few words."""

    overrides: tuple[str, ...]
    why: str
    estimate: Estimate


STATES = frozenset({"parameters", "gradients", "optimizer", "buffers", "workspace"})
PASSING = frozenset({"activations", "loss", "buffers", "workspace"})
ALL = frozenset(COMPONENTS)

Change = tuple[str, dict[str, Any], frozenset[str]]
"""What it does in words, the keys it sets, and the components that it may make smaller."""


def suggest(
    config: Config, plan: Plan, machine: Machine, before: Estimate, *, found_gpu: str | None = None
) -> list[Suggestion]:
    """The cheapest changes that make a plan fit that does not. before: its estimate. Empty: nothing known here does.

    What cannot help enough is not traced: where the components that a set of changes leaves as they are exceed the
    device by themselves.
    """
    changes = list(_changes(config, plan))
    found: list[Suggestion] = []
    for why, keys, touched in changes:
        single = None if _too_little(before, touched) else _try(config, machine, before, why, keys, found_gpu)
        if single is not None and single.estimate.fits:
            found.append(single)
            if len(found) == ENOUGH:
                return found
    together: dict[str, dict[str, Any]] = {}
    all_touched = frozenset[str]()
    for why, keys, touched in changes if not found else ():
        # A stronger form of a change takes its place.
        stronger = {earlier: its for earlier, its in together.items() if not its.keys() <= keys.keys()} | {why: keys}
        every = {key: value for its in stronger.values() for key, value in its.items()}
        if not _allowed(config, machine, every):
            # With it every set that follows would be refused too.
            continue
        together = stronger
        all_touched |= touched
        several = None
        if len(together) > 1 and not _too_little(before, all_touched):
            several = _try(config, machine, before, " + ".join(together), every, found_gpu)
        if several is not None and several.estimate.fits:
            return [several]
    return found


def _too_little(before: Estimate, touched: frozenset[str]) -> bool:
    capacity, outside = before.device.capacity_bytes, before.context_bytes + before.nccl_bytes
    if capacity is None:
        return False
    left = (sum(size for name, size in rank.components.items() if name not in touched) for rank in before.ranks)
    return max(left) + outside > capacity


def largest_micro_batch(config: Config, plan: Plan, *, found_gpu: str | None = None) -> int | None:
    """The largest micro-batch size that fits; None when the trace does not grow evenly with it.

    Storages are traced for two sizes; where they are the same ones, each grows linearly between and beyond.
    """
    first = estimate(config, plan, found_gpu=found_gpu)
    if not first.fits or first.device.capacity_bytes is None:
        return None
    here, gpu = plan.batch.micro_batch_size, first.device.gpu
    # A single sequence may be computed in another way than several, and tells nothing about them.
    for traced in (here, here + 1):
        smaller = first.profile if traced == here else get_profile(config, plan, gpu, micro_batch_size=traced)
        larger = get_profile(config, plan, gpu, micro_batch_size=traced + 1)
        if _extrapolate(smaller, larger, 1) is not None:
            break
    else:
        return None

    def fits(size: int, places: Sequence[int] | None) -> bool:
        profile = _extrapolate(smaller, larger, size - traced)
        assert profile is not None
        sized = with_micro_batch(plan, size)
        return estimate(config, sized, found_gpu=found_gpu, profile=profile, places=places, heaviest=True).fits

    def largest(places: Sequence[int] | None) -> int:
        low = high = here
        while high < LARGEST and fits(high * 2, places):
            low = high = high * 2
        high = min(high * 2, LARGEST)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, places) else (low, middle)
        return low

    if plan.degree(PIPELINE) == 1:
        return largest(None)
    found = largest([first.busiest_place])
    # With another micro-batch another place of the pipeline may be the busiest.
    return found if found == here or fits(found, None) else largest(None)


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


def _changes(config: Config, plan: Plan) -> Iterator[Change]:
    """From cheap to dear. Only what changes something."""
    train, parallel, batch = config.train, config.parallel, plan.batch
    full = {"train.activation_checkpointing": Checkpointing.full}
    if plan.param_dtype is DType.float32:
        yield "compute in bfloat16", {"precision.param_dtype": DType.bfloat16}, ALL
    if plan.degree(TENSOR) > 1 and not parallel.sequence_parallel:
        yield "norms and residuals along the sequence", {"parallel.sequence_parallel": True}, PASSING
    if plan.degree(TENSOR) == 1 and not train.chunked_loss:
        yield "loss in slices", {"train.chunked_loss": True}, frozenset({"loss", "buffers", "workspace"})
    if plan.world_size > 1:
        yield from _more_partitioning(plan)
    if train.activation_checkpointing is Checkpointing.none:
        yield "recompute every second product", {"train.activation_checkpointing": Checkpointing.selective}, PASSING
    if batch.micro_batch_size > 1:
        yield "smaller micro-batch, more accumulation", _smaller(batch.micro_batch_size, plan), PASSING
    if train.activation_checkpointing is not Checkpointing.full:
        yield "recompute whole layers", full, PASSING
    if plan.engine is EngineName.torch:
        yield from _more_division(config, plan)
    if parallel.offload.optimizer is OffloadDevice.none:
        yield from _offload(plan)


def _smaller(size: int, plan: Plan) -> dict[str, Any]:
    return {
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": plan.batch.gradient_accumulation_steps * size,
        "train.global_batch_size": None,
    }


def _more_partitioning(plan: Plan) -> Iterator[Change]:
    if plan.engine is EngineName.deepspeed:
        for stage in range(plan.zero_stage + 1, 4):
            yield f"ZeRO {stage}", {"parallel.zero_stage": stage}, ALL
    elif not plan.fully_sharded:
        yield "shard states over all ranks (FSDP)", {"parallel.dp_replicate": 1, "parallel.dp_shard": None}, ALL
    elif plan.degree(REPLICATE) > 1:
        yield "shard over all ranks instead of groups", {"parallel.dp_replicate": 1, "parallel.dp_shard": None}, STATES
    elif not plan.reshard_after_forward and plan.degree(PIPELINE) == 1:
        yield "drop gathered parameters after the forward", {"parallel.reshard_after_forward": True}, STATES


def _more_division(config: Config, plan: Plan) -> Iterator[Change]:
    """More of the ranks for one model and fewer for data, where a degree is left open to fill the rest."""
    parallel, tp = config.parallel, plan.degree(TENSOR)
    if None not in (parallel.dp_replicate, parallel.dp_shard):
        return
    for degree in sorted({2 * tp, plan.gpus_per_node}):
        if tp < degree <= plan.gpus_per_node:
            divided = {"parallel.tp": degree, "parallel.sequence_parallel": True}
            yield f"matrices and activations over {degree} GPUs", divided, ALL
    if plan.degree(PIPELINE) > 1:
        yield "twice as many stages", {"parallel.pp": 2 * plan.degree(PIPELINE)}, ALL


def _offload(plan: Plan) -> Iterator[Change]:
    cpu = OffloadDevice.cpu
    if plan.engine is EngineName.deepspeed:
        yield "optimizer in host memory", {"parallel.offload.optimizer": cpu}, STATES
        if plan.zero_stage == 3:
            both = {"parallel.offload.optimizer": cpu, "parallel.offload.parameters": cpu}
            yield "optimizer and parameters in host memory", both, STATES
    elif plan.world_size > 1:
        # Only beside sharding: on its own it is refused where every rank holds the whole model.
        both = {"parallel.offload.optimizer": cpu, "parallel.offload.parameters": cpu}
        yield "parameters, gradients and optimizer in host memory", both, STATES


def _try(
    config: Config, machine: Machine, before: Estimate, why: str, keys: dict[str, Any], found_gpu: str | None
) -> Suggestion | None:
    """None where the change does not go with the rest of the configuration, leaves states that do not fit, or is not
    enough for what is the busiest place of the pipeline without it."""
    changed = _changed(config, keys)
    try:
        plan = make_plan(changed, machine)
        if _states(changed, plan, before, config.parallel.tp or 1) > (before.device.capacity_bytes or inf):
            return None
        if plan.degree(PIPELINE) > 1:
            place = min(before.busiest_place, plan.degree(PIPELINE) - 1)
            if not estimate(changed, plan, found_gpu=found_gpu, places=[place]).fits:
                return None
        found = estimate(changed, plan, found_gpu=found_gpu, heaviest=True)
    except CookbookError:
        return None
    words = tuple(f"{key}={as_text(value)}" for key, value in keys.items())
    return Suggestion(overrides=words, why=why, estimate=found)


def _allowed(config: Config, machine: Machine, keys: dict[str, Any]) -> bool:
    """Whether there is a plan with these changes."""
    try:
        make_plan(_changed(config, keys), machine)
    except CookbookError:
        return False
    return True


def _changed(config: Config, keys: dict[str, Any]) -> Config:
    changed = deepcopy(config)
    for key, value in keys.items():
        set_value(changed, key, value)
    return changed


def _states(config: Config, plan: Plan, before: Estimate, tp: int) -> float:
    """A bound from below that needs no trace. tp: of the estimate before."""
    anatomy = before.profile.outline.anatomy
    trained = sum(parameter.numel for parameter in anatomy.parameters() if parameter.trainable)
    frozen = sum(anatomy.frozen_tensors(BYTES[plan.param_dtype]))
    return states_bytes(plan, trained * tp, config.optimizer, frozen=frozen * tp)
