"""Changes that may make a plan smaller: each has its keys, in the order of their cost in speed.

`suggest` tries them, alone and together. A change names the components that it can shrink and the least that it can
leave of them, so that a change that cannot be enough is not traced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.choices import Checkpointing, DType, EngineName, OffloadDevice
from configs.keys import value_at
from configs.schema import Config
from trainer import linear
from trainer.axes import PIPELINE, REPLICATE, TENSOR
from trainer.estimate.timeline import COMPONENTS
from trainer.optim import table
from trainer.plan.plan import Plan

STATES = frozenset({"parameters", "gradients", "optimizer", "buffers", "workspace"})
PASSING = frozenset({"activations", "loss", "buffers", "workspace"})
ALL = frozenset(COMPONENTS)
ALTERING = frozenset({table.NAME, linear.KEY})


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """why: its effect, in a few words.
    keys: the overrides that it sets, without those that are set so already.
    touched: the components that it may make smaller.
    slowdown: its place in the order of lost speed.
    alters: the run then trains something else, or by another rule; it is suggested only where nothing else fits."""

    why: str
    keys: Mapping[str, Any]
    touched: frozenset[str]
    slowdown: int
    alters: bool = False


def changes(config: Config, plan: Plan) -> list[Change]:
    """All changes from the smallest to the largest: by number of keys, then by lost speed; without those of no
    effect."""
    found: list[Change] = []
    for why, keys, touched in _known(config, plan):
        different = {key: value for key, value in keys.items() if value_at(config, key) != value}
        if different:
            alters = not ALTERING.isdisjoint(different)
            found.append(Change(why=why, keys=different, touched=touched, slowdown=len(found), alters=alters))
    return sorted(found, key=lambda one: (len(one.keys), one.slowdown))


Known = tuple[str, dict[str, Any], frozenset[str]]


def _known(config: Config, plan: Plan) -> Iterator[Known]:
    """The changes from the fastest to the slowest; those that alter the run come last."""
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
    if (leaner := table.leaner(config.optimizer)) is not None:
        yield *leaner, STATES
    if (lighter := linear.lighter(config)) is not None:
        yield *lighter, ALL


def _smaller(size: int, plan: Plan) -> dict[str, Any]:
    return {
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": plan.batch.gradient_accumulation_steps * size,
        "train.global_batch_size": None,
    }


def _more_partitioning(plan: Plan) -> Iterator[Known]:
    if plan.engine is EngineName.deepspeed:
        for stage in range(plan.zero_stage + 1, 4):
            yield f"ZeRO {stage}", {"parallel.zero_stage": stage}, ALL
    elif not plan.fully_sharded:
        yield "shard states over all ranks (FSDP)", {"parallel.dp_replicate": 1, "parallel.dp_shard": None}, ALL
    elif plan.degree(REPLICATE) > 1:
        yield "shard over all ranks instead of groups", {"parallel.dp_replicate": 1, "parallel.dp_shard": None}, STATES
    elif not plan.reshard_after_forward and plan.degree(PIPELINE) == 1:
        yield "drop gathered parameters after the forward", {"parallel.reshard_after_forward": True}, STATES


def _more_division(config: Config, plan: Plan) -> Iterator[Known]:
    """Use more of the ranks for one model and fewer for data, where a degree is left open to fill the rest."""
    parallel, tp = config.parallel, plan.degree(TENSOR)
    if None not in (parallel.dp_replicate, parallel.dp_shard):
        return
    for degree in sorted({2 * tp, plan.gpus_per_node}):
        if tp < degree <= plan.gpus_per_node:
            divided = {"parallel.tp": degree, "parallel.sequence_parallel": True}
            yield f"matrices and activations over {degree} GPUs", divided, ALL
    if plan.degree(PIPELINE) > 1:
        yield "twice as many stages", {"parallel.pp": 2 * plan.degree(PIPELINE)}, ALL


def _offload(plan: Plan) -> Iterator[Known]:
    cpu = OffloadDevice.cpu
    if plan.engine is EngineName.deepspeed:
        yield "optimizer in host memory", {"parallel.offload.optimizer": cpu}, STATES
        if plan.zero_stage == 3:
            both = {"parallel.offload.optimizer": cpu, "parallel.offload.parameters": cpu}
            yield "optimizer and parameters in host memory", both, STATES
    elif plan.world_size > 1:
        # This is offered only together with sharding: it is refused where every rank holds the whole model.
        both = {"parallel.offload.optimizer": cpu, "parallel.offload.parameters": cpu}
        yield "parameters, gradients and optimizer in host memory", both, STATES
