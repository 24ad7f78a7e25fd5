"""The layouts that this trainer can run on a cluster, each as the overrides that select it.

    tp 1, 2, 4 .. a node   x   pp 1, 2, 4 .. 16   x   cp 1, and more for long sequences   x   what data parallel does:
    copies (DDP), shards over all ranks (FSDP), over a node and copies of that (HSDP), or ZeRO 1, 2, 3 with and without
    offload   x   experts over the ranks of a node, or over as many as there are, where FSDP alone divides the rest

times micro-batch sizes and activation checkpointing. A preset is defined in `configs/parallel` alone: the search
starts from the preset with the nearest axes. This module knows no rules between options: `make_plan` refuses wrong
combinations. Torch-free.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from math import gcd
from typing import Any

from configs.choices import Checkpointing, EngineName, OffloadDevice
from configs.keys import as_text, set_value
from configs.load import composed_options
from configs.schema import Config, Offload, Parallel
from trainer.axes import AXES, CONTEXT, EXPERTS, PIPELINE, REPLICATE, SHARD, TENSOR
from trainer.plan.model_fields import config_fields, experts_of

MICRO_BATCHES = (1, 2, 4, 8)
PIPELINES = (1, 2, 4, 8, 16)
LONG = 16384
"""Tokens per sequence from which splitting sequences is tried: shorter ones gain nothing."""
SCHEDULES = ("1f1b", "interleaved_1f1b")
SEARCHED = ("parallel.pipeline", "parallel.sequence_parallel", "parallel.reshard_after_forward")


@dataclass(frozen=True, slots=True)
class Candidate:
    """preset: the file of configs/parallel to start from. keys: {key: value} over it; all that differs."""

    preset: str
    keys: Mapping[str, Any]

    @property
    def overrides(self) -> tuple[str, ...]:
        """The overrides, as typed on the command line."""
        return (f"parallel={self.preset}", *(f"{key}={as_text(value)}" for key, value in self.keys.items()))

    @property
    def layout(self) -> tuple[str, ...]:
        """The overrides that say how the model is split, without the batch and the recompute."""
        return tuple(word for word in self.overrides if word.startswith("parallel"))

    def apply(self, config: Config) -> Config:
        """`config` with this layout instead of its own."""
        # Only the groups that are written to are copied; a thousand deep copies take longer than computing the times.
        groups = {"parallel": config.parallel, "train": config.train, "cluster": config.cluster}
        changed = replace(config, **{name: replace(group) for name, group in groups.items()})
        for name in _searched():
            setattr(changed.parallel, name, copy.copy(getattr(presets()[self.preset], name)))
        for key, value in self.keys.items():
            set_value(changed, key, value)
        return changed


@cache
def presets() -> dict[str, Parallel]:
    return composed_options("parallel")


@cache
def _searched() -> set[str]:
    """The fields of `parallel` that a preset or the search decides; the others stay as the user has them."""
    chosen = {f.name for f in fields(Parallel) for one in presets().values() if getattr(one, f.name) != f.default}
    return chosen | {key.rpartition(".")[2] for key in SEARCHED}


def _axes(preset: str) -> set[str]:
    return {axis.name for axis in AXES if getattr(presets()[preset], axis.name) != 1}


def candidates(config: Config, *, world_size: int, gpus_per_node: int) -> Iterator[Candidate]:
    """Every combination worth a try. The global batch is that of `config`, which must be given."""
    for layout in _layouts(config, world_size, gpus_per_node):
        for recompute in Checkpointing:
            for size in MICRO_BATCHES:
                shape = {"train.micro_batch_size": size, "train.activation_checkpointing": recompute}
                yield Candidate(layout.preset, {**layout.keys, **shape, "train.chunked_loss": True})


def _layouts(config: Config, world_size: int, gpus_per_node: int) -> Iterator[Candidate]:
    experts = experts_of(config_fields(config)) or 1
    for ep in sorted({gcd(ranks, experts) for ranks in (gpus_per_node, world_size)} - {1}):
        yield nearest({SHARD: world_size, EXPERTS: ep}, {})
    for tp in _powers(gpus_per_node):
        for pp in PIPELINES:
            for cp in _powers(16) if config.data.seq_len >= LONG else (1,):
                ranks, rest = divmod(world_size, tp * pp * cp)
                if rest == 0 and ranks > 0:
                    yield from _torch(tp=tp, pp=pp, cp=cp, ranks=ranks, node=max(1, gpus_per_node // (tp * cp)))
        if world_size % tp == 0:
            yield from _zero(tp, world_size // tp)


def _torch(*, tp: int, pp: int, cp: int, ranks: int, node: int) -> Iterator[Candidate]:
    """ranks: data-parallel ones. node: how many of them are on one node."""
    model = {TENSOR: tp, PIPELINE: pp, CONTEXT: cp}
    fixed: dict[str, Any] = {"parallel.sequence_parallel": True} if tp > 1 else {}
    for schedule in SCHEDULES if pp > 1 else (None,):
        keys = fixed if schedule is None else {**fixed, "parallel.pipeline.schedule": schedule}
        if cp == 1:
            yield nearest({**model, REPLICATE: ranks}, keys)
        if ranks * cp == 1:
            continue
        yield nearest({**model, SHARD: ranks}, keys)
        if pp == 1 and cp == 1:
            yield nearest({**model, SHARD: ranks}, {**keys, "parallel.reshard_after_forward": False})
        if cp == 1 and 1 < node < ranks and ranks % node == 0:
            yield nearest({**model, REPLICATE: ranks // node, SHARD: node}, keys)


def nearest(degrees: Mapping[str, int], keys: Mapping[str, Any]) -> Candidate:
    """The torch preset nearest to a combination, which lacks as few of its axes as can be, sharding last of all; every
    degree is given over it."""
    wanted = {axis for axis, size in degrees.items() if size > 1}

    def distance(name: str) -> tuple[int, int, bool]:
        lacking = wanted - _axes(name)
        return len(lacking), len(_axes(name) - wanted), SHARD in lacking

    torch = [name for name, one in presets().items() if one.engine is EngineName.torch and one.offload == Offload()]
    preset = min(torch, key=distance)
    given = [axis.name for axis in AXES if axis.name in wanted | _axes(preset)]
    return Candidate(preset, {**{f"parallel.{axis}": degrees.get(axis, 1) for axis in given}, **keys})


def _zero(tp: int, ranks: int) -> Iterator[Candidate]:
    """Every preset of DeepSpeed's, but those that need a disk."""
    keys = {"parallel.tp": tp, "parallel.sequence_parallel": True} if tp > 1 else {}
    for name, one in presets().items():
        on_disk = OffloadDevice.nvme in (one.offload.optimizer, one.offload.parameters)
        if one.engine is EngineName.deepspeed and not on_disk and (TENSOR in _axes(name)) is (tp > 1):
            yield Candidate(name, {**keys, "parallel.dp_shard": ranks})


def _powers(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]
