"""The range of every number in the schema. `load` checks them before anything is derived from a number.

A range covers what the arithmetic, the allocator and the launchers accept, and catches typing errors by orders of
magnitude. `trainer.rules` checks combinations of numbers. NaN lies in no range.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from configs.keys import schema_keys, value_at
from configs.schema import Config
from configs.schema_train import RoleGroups

LARGE = 1e38  # just below the largest number of float32
BILLION = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from least to most. above, below: the bound itself is excluded."""

    least: float = -inf
    most: float = inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def rule(self, value: float) -> str:
        """The rule for a number outside the range. It names the nearer bound if one is close."""
        least = f"greater than {self.least:g}" if self.above else f"{self.least:g} or more"
        most = f"less than {_show(self.most)}" if self.below else f"{_show(self.most)} or less"
        if self.most <= 3:
            return f"must be {least} and {most}"
        return f"must be {most}" if value > self.most else f"must be {least}"


def _show(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}" if number > 1e9 else f"{number:,.10g}"


def _whole(least: int, most: int = BILLION) -> Range:
    return Range(least=least, most=most)


POSITIVE = Range(least=0, most=LARGE, above=True)
NOT_NEGATIVE = Range(least=0, most=LARGE)
FRACTION = Range(least=0, most=1, below=True)
COUNT, COUNT_OR_NONE = _whole(1), _whole(0)
DEGREE = _whole(1, 1_000_000)

RANGES: Mapping[str, Range] = {
    "data.seq_len": _whole(2, 2**30),
    "data.validation_fraction": FRACTION,
    "data.shuffle_buffer": COUNT,
    "data.ignore_fraction": FRACTION,
    "data.num_workers": _whole(0, 128),
    "parallel.dp_replicate": DEGREE,
    "parallel.dp_shard": DEGREE,
    "parallel.tp": DEGREE,
    "parallel.ep": DEGREE,
    "parallel.cp": DEGREE,
    "parallel.pp": DEGREE,
    "parallel.zero_stage": _whole(0, 3),
    "parallel.deepspeed.reduce_bucket_size": _whole(1, 10**12),
    "parallel.deepspeed.allgather_bucket_size": _whole(2, 10**12),
    "parallel.deepspeed.sub_group_size": _whole(1, 10**12),
    "parallel.deepspeed.stage3_prefetch_bucket_size": _whole(0, 10**12),
    "parallel.deepspeed.stage3_param_persistence_threshold": _whole(0, 10**12),
    "parallel.deepspeed.stage3_model_persistence_threshold": _whole(0, 10**12),
    "parallel.deepspeed.stage3_max_live_parameters": _whole(0, 10**12),
    "parallel.deepspeed.stage3_max_reuse_distance": _whole(0, 10**12),
    "parallel.deepspeed.zero_hpz_partition_size": DEGREE,
    # States are updated in groups of at most 4 * 10**8 bytes, and what is smaller than a block is not swapped.
    "parallel.deepspeed.aio.block_size": _whole(4096, 2**28),
    "parallel.deepspeed.aio.queue_depth": _whole(1, 65_536),
    "parallel.deepspeed.aio.intra_op_parallelism": _whole(1, 1024),
    "parallel.fsdp.reshard_size": _whole(2, 1_000_000),
    "parallel.fsdp.forward_prefetch": _whole(1, 1000),
    "parallel.fsdp.backward_prefetch": _whole(1, 1000),
    "parallel.pipeline.stages_per_rank": _whole(1, 1024),
    "parallel.pipeline.split": _whole(0, 1_000_000),
    "precision.loss_scale": POSITIVE,
    "precision.loss_scale_init": POSITIVE,
    "precision.loss_scale_window": COUNT,
    "tuning.rank": _whole(1, 65_536),
    "tuning.alpha": POSITIVE,
    "tuning.dropout": FRACTION,
    "tuning.bottleneck": _whole(1, 1_000_000),
    "tuning.virtual_tokens": _whole(1, 1_000_000),
    "tuning.layers": _whole(0, 100_000),
    "moe.coefficient": NOT_NEGATIVE,
    "moe.z_loss": NOT_NEGATIVE,
    "moe.bias_update_rate": NOT_NEGATIVE,
    "optimizer.lr": POSITIVE,
    "optimizer.beta1": FRACTION,
    "optimizer.beta2": FRACTION,
    "optimizer.eps": Range(least=0, most=1e6, above=True),
    "optimizer.weight_decay": Range(least=0, most=1e6),
    **{f"optimizer.groups.{item.name}.lr": POSITIVE for item in fields(RoleGroups)},
    **{f"optimizer.groups.{item.name}.weight_decay": Range(least=0, most=1e6) for item in fields(RoleGroups)},
    "scheduler.warmup_steps": COUNT_OR_NONE,
    "scheduler.warmup_ratio": FRACTION,
    "scheduler.decay_steps": COUNT_OR_NONE,
    "scheduler.min_lr_ratio": Range(least=0, most=1),
    "train.steps": COUNT,
    "train.epochs": Range(least=0, most=1_000_000),
    "train.micro_batch_size": _whole(1, 1_000_000),
    "train.gradient_accumulation_steps": _whole(1, 1_000_000),
    "train.global_batch_size": COUNT,
    "train.clip_grad_norm": NOT_NEGATIVE,
    "train.clip_grad_value": NOT_NEGATIVE,
    "train.eval_every": COUNT_OR_NONE,
    "train.eval_samples": COUNT_OR_NONE,
    "train.samples.from_validation": _whole(0, 1000),
    "train.samples.tokens": COUNT,
    "train.samples.temperature": Range(least=0, most=1000),
    # torch takes 64 bits, and a rank adds its own number.
    "train.seed": _whole(0, 2**63 - 1),
    "train.timeout_minutes": Range(least=0, most=100_000, above=True),
    "checkpoint.every": COUNT_OR_NONE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": COUNT_OR_NONE,
    "optimizer.ema": FRACTION,
    "train.label_smoothing": FRACTION,
    "train.neftune_alpha": NOT_NEGATIVE,
    "train.patience": COUNT_OR_NONE,
    "train.min_delta": NOT_NEGATIVE,
    "cluster.nodes": _whole(1, 100_000),
    "cluster.gpus_per_node": _whole(1, 1024),
    "cluster.gpu_memory_gib": Range(least=0, most=1e6, above=True),
    "cluster.network_gb_per_second": Range(least=0, most=1e6, above=True),
    "cluster.host_gb_per_second": Range(least=0, most=1e6, above=True),
    "cluster.nvme_gb_per_second": Range(least=0, most=1e6, above=True),
    "cluster.kubernetes.cpus": _whole(1, 100_000),
    "cluster.kubernetes.port": _whole(1, 65_535),
    "cluster.kubernetes.grace_seconds": _whole(1, 1_000_000),
    "cluster.ray.cpus_per_node": _whole(1, 100_000),
    "cluster.ray.start_minutes": Range(least=0.01, most=100_000),
    "cluster.slurm.cpus_per_node": _whole(1, 100_000),
    "cluster.slurm.signal_seconds": _whole(1, 65_535),  # sbatch keeps it in 16 bits
    "cluster.slurm.max_requeues": COUNT_OR_NONE,
    "cluster.slurm.start_minutes": Range(least=0.01, most=100_000),
    "launcher.master_port": _whole(1, 65_535),
    "launcher.max_restarts": COUNT_OR_NONE,
    "logging.every": COUNT,
    "estimate.efficiency": Range(least=0, most=1, above=True),
    "estimate.imbalance": Range(least=1, most=1_000_000),
    "estimate.context_gib": Range(least=0, most=1e6),
    "estimate.nccl_gib": Range(least=0, most=1e6),
    "profile_steps": COUNT,
}


def check_ranges(config: Config) -> Iterator[str]:
    """One line for each number, or list of numbers, outside its range: key, value, range."""
    for key in schema_keys():
        value = value_at(config, key)
        if (rule := broken_range(key, value)) is not None:
            yield f"{key}={value}: {rule}"


def broken_range(key: str, value: Any) -> str | None:
    """The range that a number, or an element of a list, violates, in words. None if it is allowed."""
    if key not in RANGES:
        return None
    numbers = value if isinstance(value, list) else [] if value is None else [value]
    wrong = next((number for number in numbers if not RANGES[key].holds(number)), None)
    each = "each " if isinstance(value, list) else ""
    return None if wrong is None else each + RANGES[key].rule(wrong)
