"""Validity of DeepSpeed's settings, `parallel.deepspeed.*`, without torch and without DeepSpeed.

DeepSpeed ignores a setting that a stage's optimizer does not read. Here it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.choices import DType, EngineName, OffloadDevice
from configs.schema import Config, DeepSpeed
from configs.zero_settings import READ, is_plain


def given(own: DeepSpeed) -> dict[str, Any]:
    """Settings of `zero_optimization` that are not null, by DeepSpeed's names."""
    found = {
        "reduce_bucket_size": own.reduce_bucket_size,
        "allgather_bucket_size": own.allgather_bucket_size,
        "overlap_comm": own.overlap_comm,
        "contiguous_gradients": own.contiguous_gradients,
        "reduce_scatter": own.reduce_scatter,
        "sub_group_size": own.sub_group_size,
        "stage3_prefetch_bucket_size": own.stage3_prefetch_bucket_size,
        "stage3_param_persistence_threshold": own.stage3_param_persistence_threshold,
        "stage3_model_persistence_threshold": own.stage3_model_persistence_threshold,
        "stage3_max_live_parameters": own.stage3_max_live_parameters,
        "stage3_max_reuse_distance": own.stage3_max_reuse_distance,
        "stage3_use_all_reduce_for_fetch_params": own.stage3_use_all_reduce_for_fetch_params,
        "stage3_allgather_sequential": own.stage3_allgather_sequential,
        "zero_hpz_partition_size": own.zero_hpz_partition_size,
    }
    return {name: value for name, value in found.items() if value is not None}


def given_aio(own: DeepSpeed) -> dict[str, Any]:
    """The same of its section `aio`."""
    aio = own.aio
    found = {
        "block_size": aio.block_size,
        "queue_depth": aio.queue_depth,
        "intra_op_parallelism": aio.intra_op_parallelism,
        "single_submit": aio.single_submit,
        "overlap_events": aio.overlap_events,
    }
    return {name: value for name, value in found.items() if value is not None}


def accumulating(config: Config) -> DType:
    """The dtype in which gradients add up over micro-batches."""
    return config.parallel.deepspeed.grad_accum_dtype or config.precision.master_dtype


def problems(config: Config) -> Iterator[str]:
    """Settings that this run would not read."""
    parallel = config.parallel
    offloads = (parallel.offload.optimizer, parallel.offload.parameters)
    disk = OffloadDevice.nvme in offloads
    plain = is_plain(stage=parallel.zero_stage, compute=config.precision.param_dtype, offload=offloads[0])
    for name, value in given(parallel.deepspeed).items():
        key, read = f"parallel.deepspeed.{name}={_text(value)}", READ[name]
        if parallel.engine is not EngineName.deepspeed:
            yield f"{key}: needs parallel.engine=deepspeed; leave it out, or use parallel=zero2"
        elif parallel.zero_stage not in read.stages:
            stages = f"only stage 3 reads it, this is stage {parallel.zero_stage}"
            if parallel.zero_stage == 3:
                stages = "stage 3 does not read it, stages 1 and 2 do"
            yield f"{key}: {stages}; leave it out"
        elif plain and not read.plain:
            yield (
                f"{key}: stage 1 in bfloat16 has an optimizer that does not read it, and reduces the gradient as a"
                " whole; leave it out, or use parallel=zero2"
            )
        elif disk and not read.disk:
            yield f"{key}: buffers between memory and disk depend on it, and are computed from the model; leave it out"
        else:
            yield from _together(config, name, key, value)
    yield from _accumulation(config)
    if parallel.deepspeed.comms_logger and parallel.engine is not EngineName.deepspeed:
        yield (
            "parallel.deepspeed.comms_logger=true: needs parallel.engine=deepspeed; leave it out, or use profile=true,"
            " which traces messages under every engine"
        )
    for name, value in given_aio(parallel.deepspeed).items():
        if parallel.engine is not EngineName.deepspeed or not disk:
            yield f"parallel.deepspeed.aio.{name}={_text(value)}: nothing is offloaded to nvme; leave it out"


def _accumulation(config: Config) -> Iterator[str]:
    parallel, precision = config.parallel, config.precision
    asked = parallel.deepspeed.grad_accum_dtype
    key = f"parallel.deepspeed.grad_accum_dtype={asked}"
    allowed = dict.fromkeys((precision.param_dtype, precision.master_dtype))
    if asked is None:
        return
    if parallel.engine is not EngineName.deepspeed:
        yield f"{key}: needs parallel.engine=deepspeed; leave it out, or use parallel=zero3"
    elif parallel.zero_stage != 3:
        yield (
            f"{key}: stages 1 and 2 choose another optimizer by it; leave it out, or use parallel=zero3, this is stage"
            f" {parallel.zero_stage}"
        )
    elif OffloadDevice.nvme in (parallel.offload.optimizer, parallel.offload.parameters):
        yield f"{key}: buffers between memory and disk depend on it, and are computed from the model; leave it out"
    elif asked not in allowed:
        yield f"{key}: gradients add up as the parameters are or as the master weights; use {' or '.join(allowed)}"


def _together(config: Config, name: str, key: str, value: Any) -> Iterator[str]:
    """Requirements of a setting on other settings."""
    offload, own = config.parallel.offload, config.parallel.deepspeed
    if name == "stage3_prefetch_bucket_size" and offload.parameters is OffloadDevice.nvme and value:
        yield f"{key}: parameters on disk are read when they are needed, not ahead; use 0, or leave it out"
    elif name == "stage3_prefetch_bucket_size" and own.stage3_allgather_sequential:
        yield (
            f"{key}: parallel.deepspeed.stage3_allgather_sequential=true gathers nothing ahead; leave one of the two"
            " out"
        )
    elif name == "allgather_bucket_size" and value % 2:
        yield f"{key}: DeepSpeed divides it by two; use an even number"
    elif name == "contiguous_gradients" and not value and offload.optimizer is not OffloadDevice.none:
        yield f"{key}: gradients of an offloaded optimizer are always copied into a buffer; use true, or leave it out"
    elif name == "contiguous_gradients" and not value and own.overlap_comm:
        yield (
            f"{key}: parallel.deepspeed.overlap_comm=true fills a second buffer, which DeepSpeed then never lets go"
            " of; leave one of the two out"
        )
    elif name == "zero_hpz_partition_size" and value > 1 and offload.parameters is not OffloadDevice.none:
        yield (
            f"{key}: parallel.offload.parameters={offload.parameters} takes from the GPU what the second copy would"
            " keep there; use none, or leave it out"
        )


def check_groups(config: Config, ranks: int) -> Iterator[str]:
    """ranks: number of ranks over which ZeRO partitions."""
    size = config.parallel.deepspeed.zero_hpz_partition_size
    if size is not None and ranks % size:
        yield (
            f"parallel.deepspeed.zero_hpz_partition_size={size}: {ranks} data-parallel ranks are not divisible by it;"
            " use the GPUs of a node, or a divisor of them"
        )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
