"""The layouts that this trainer can run on a cluster, each as the overrides that select it.

    tp 1, 2, 4 .. a node   x   pp 1, 2, 4 .. 16   x   cp 1, and more for long sequences   x   what data parallel does:
    copies (DDP), shards over all ranks (FSDP), over a node and copies of that (HSDP), or ZeRO 1, 2, 3 with and without
    offload

times micro-batch sizes and activation checkpointing. What does not go together is not known here: `make_plan` refuses
it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from configs.choices import Checkpointing, EngineName, OffloadDevice
from configs.schema import Config, Offload, Pipeline
from trainer.axes import CONTEXT, PIPELINE, TENSOR

MICRO_BATCHES = (1, 2, 4, 8)
PIPELINES = (1, 2, 4, 8, 16)
LONG = 16384
"""Tokens per sequence from which splitting sequences is tried: shorter ones are split for nothing."""
SCHEDULES = ("1f1b", "interleaved_1f1b")


@dataclass(frozen=True, slots=True)
class Candidate:
    """preset: the file of configs/parallel to start from. keys: {key: value} over it; all that differs."""

    preset: str
    keys: Mapping[str, Any]

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides, as typed on the command line."""
        return (f"parallel={self.preset}", *(f"{key}={_word(value)}" for key, value in self.keys.items()))

    @property
    def layout(self) -> tuple[str, ...]:
        """The words that say how the model is split, without the batch and the recompute."""
        return tuple(word for word in self.words if word.startswith("parallel"))

    def apply(self, config: Config) -> Config:
        """`config` with this layout in place of its own."""
        # The groups that are written to; a deep copy of all, a thousand times, takes longer than the times themselves.
        groups = {"parallel": config.parallel, "train": config.train, "cluster": config.cluster}
        changed = replace(config, **{name: replace(group) for name, group in groups.items()})
        parallel = changed.parallel
        parallel.preset, parallel.engine, parallel.zero_stage = self.preset, EngineName.torch, 0
        parallel.dp_replicate = parallel.dp_shard = parallel.tp = parallel.cp = parallel.pp = 1
        parallel.pipeline, parallel.offload = Pipeline(), Offload()
        parallel.sequence_parallel, parallel.reshard_after_forward = False, None
        if self.preset.startswith("zero"):
            parallel.engine, parallel.zero_stage = EngineName.deepspeed, int(self.preset[4])
            if self.preset.endswith("_offload"):
                parallel.offload.optimizer = OffloadDevice.cpu
                parallel.offload.parameters = OffloadDevice.cpu if parallel.zero_stage == 3 else OffloadDevice.none
        for key, value in self.keys.items():
            *path, last = key.split(".")
            owner: Any = changed
            for name in path:
                owner = getattr(owner, name)
            setattr(owner, last, value)
        return changed


def candidates(config: Config, *, world_size: int, gpus_per_node: int) -> Iterator[Candidate]:
    """Every combination worth a try. The global batch is that of `config`, which must be given."""
    for layout in _layouts(config, world_size, gpus_per_node):
        for recompute in Checkpointing:
            for size in MICRO_BATCHES:
                shape = {"train.micro_batch_size": size, "train.activation_checkpointing": recompute}
                yield Candidate(layout.preset, {**layout.keys, **shape, "train.chunked_loss": True})


def _layouts(config: Config, world_size: int, gpus_per_node: int) -> Iterator[Candidate]:
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
    fixed: dict[str, Any] = {
        f"parallel.{name}": size for name, size in ((TENSOR, tp), (PIPELINE, pp), (CONTEXT, cp)) if size > 1
    }
    if tp > 1:
        fixed["parallel.sequence_parallel"] = True
    for schedule in SCHEDULES if pp > 1 else (None,):
        keys = fixed if schedule is None else {**fixed, "parallel.pipeline.schedule": schedule}
        if cp == 1:
            yield Candidate(_name(tp, pp, cp, ranks, "copies"), {**keys, "parallel.dp_replicate": ranks})
        if ranks * cp == 1:
            continue
        sharded = Candidate(_name(tp, pp, cp, ranks, "shards"), {**keys, "parallel.dp_shard": ranks})
        yield sharded
        if pp == 1 and cp == 1:
            yield Candidate(sharded.preset, {**sharded.keys, "parallel.reshard_after_forward": False})
        if cp == 1 and 1 < node < ranks and ranks % node == 0:
            mixed = {"parallel.dp_replicate": ranks // node, "parallel.dp_shard": node}
            yield Candidate(_name(tp, pp, cp, ranks, "both"), {**keys, **mixed})


def _name(tp: int, pp: int, cp: int, ranks: int, data: str) -> str:
    """The preset nearest to a combination; every degree is given beside it."""
    if cp > 1:
        return "context"
    if tp > 1 and pp > 1:
        return "3d" if data == "copies" else "3d_zero1"
    if tp > 1:
        return "tensor" if ranks == 1 else "tensor_data" if data == "copies" else "tensor_fsdp"
    if pp > 1:
        return "pipeline" if ranks == 1 else "pipeline_data" if data == "copies" else "pipeline_fsdp"
    if ranks == 1:
        return "single"
    return {"copies": "ddp", "shards": "fsdp", "both": "hsdp"}[data]


def _zero(tp: int, ranks: int) -> Iterator[Candidate]:
    if tp > 1:
        keys = {"parallel.tp": tp, "parallel.sequence_parallel": True, "parallel.dp_shard": ranks}
        yield from (Candidate(f"zero{stage}_tensor", keys) for stage in (1, 2))
        return
    for preset in ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload"):
        yield Candidate(preset, {"parallel.dp_shard": ranks})


def _powers(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]


def _word(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)
