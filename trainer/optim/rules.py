"""What an optimizer cannot be combined with, and why. Torch-free; read by `rules`."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import DType, EngineName, Implementation, OffloadDevice, OptimizerName
from configs.schema import Config

SMALLEST_EPS = 1e-18  # float32 and bfloat16 hold its square; below, a row without gradients becomes 0 * infinity


def check_optimizer(config: Config, *, sharded: bool) -> Iterator[str]:
    """One line for each problem of `optimizer` and `scheduler`. sharded: whether engine torch makes DTensors of the
    parameters."""
    optimizer, scheduler, train = config.optimizer, config.scheduler, config.train
    if optimizer.implementation is Implementation.deepspeed_cpu:
        if config.parallel.offload.optimizer is OffloadDevice.none or config.parallel.engine is EngineName.torch:
            yield (
                "optimizer.implementation=deepspeed_cpu: is for an offloaded optimizer; use parallel=zero2_offload,"
                " or auto"
            )
        if optimizer.name is not OptimizerName.adamw:
            yield f"optimizer.implementation=deepspeed_cpu: has adamw only, not {optimizer.name}; use auto"
    if optimizer.name is OptimizerName.sgd and optimizer.implementation is Implementation.fused and sharded:
        yield "optimizer.implementation=fused: torch has no fused sgd for sharded parameters; use foreach or auto"
    if optimizer.name is OptimizerName.adafactor:
        yield from _check_adafactor(config, sharded=sharded)
    if optimizer.name is OptimizerName.adamw_8bit:
        yield from _check_8bit(config, sharded=sharded)
    if scheduler.warmup_steps + scheduler.decay_steps > train.steps:
        yield (
            f"scheduler.warmup_steps={scheduler.warmup_steps}: with scheduler.decay_steps={scheduler.decay_steps} it is"
            f" longer than train.steps={train.steps}; shorten it"
        )


def _check_adafactor(config: Config, *, sharded: bool) -> Iterator[str]:
    """It factors whole matrices: a DTensor's column means are norms over ranks, which torch cannot square in place."""
    optimizer = config.optimizer
    if optimizer.implementation is Implementation.fused:
        yield "optimizer.implementation=fused: torch has no fused adafactor; use for_loop, foreach or auto"
    if optimizer.eps < SMALLEST_EPS:
        yield f"optimizer.eps={optimizer.eps}: adafactor squares it in float32; use {SMALLEST_EPS} or more"
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=adafactor: needs the rows and columns of whole matrices, and DeepSpeed's partitions are"
            " flat; use parallel=ddp, or optimizer=adamw"
        )
    elif sharded:
        yield (
            "optimizer.name=adafactor: torch computes it on whole matrices only, and pp, dp_shard, cp and tp make"
            " sharded tensors of them; use parallel=ddp, or optimizer=adamw"
        )


def _check_8bit(config: Config, *, sharded: bool) -> Iterator[str]:
    """Blocks are counted from a tensor's first value: cut tensors have other blocks, and each layout would train on
    its own rounding."""
    implementation = config.optimizer.implementation
    if implementation not in (Implementation.auto, Implementation.fused):
        yield f"optimizer.implementation={implementation}: adamw_8bit has bitsandbytes' fused kernel only; use auto"
    if DType.float64 in (config.precision.param_dtype, config.precision.master_dtype):
        yield "precision=fp64: optimizer=adamw_8bit computes in float32; use optimizer=adamw, or precision=fp32"
    if config.parallel.engine is EngineName.deepspeed or sharded:
        yield (
            "optimizer.name=adamw_8bit: blocks of 256 values share a scale, and what cuts tensors cuts blocks, so that"
            " each layout would train otherwise; use parallel=single or ddp, or optimizer=adamw"
        )
