"""Where adapters can be trained: each rule yields one line with key, value, rule and remedy. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import DType, EngineName, TuningMethod
from configs.schema import Config


def check_tuning(config: Config) -> Iterator[str]:
    """All problems of the group `tuning`, and of other groups beside it."""
    tuning, parallel = config.tuning, config.parallel
    if tuning.method is not TuningMethod.qlora and not tuning.double_quantization:
        yield (
            f"tuning.double_quantization=false: is for 4-bit weights, this is tuning={tuning.method}; set"
            " tuning=qlora, or leave it out"
        )
    if tuning.method is TuningMethod.full:
        if tuning.target_modules:
            yield (
                f"tuning.target_modules={tuning.target_modules}: is for adapters, this is tuning=full; choose"
                " tuning=lora, or leave it out"
            )
        return
    if parallel.engine is EngineName.deepspeed and tuning.method is TuningMethod.qlora:
        yield "tuning=qlora: DeepSpeed casts and flattens parameters, and 4-bit ones cannot be; use parallel=fsdp"
    if tuning.method is TuningMethod.qlora:
        yield from _check_quantized(config)
    if config.train.compile:
        yield "train.compile=true: compiles no layers with adapters; set it to false, or use tuning=full"


def _check_quantized(config: Config) -> Iterator[str]:
    """4-bit weights are packed bytes: what computes on a part of a matrix cannot unpack its part."""
    if config.parallel.engine is EngineName.torch and config.parallel.tp > 1:
        yield (
            f"parallel.tp={config.parallel.tp}: cuts matrices that tuning=qlora keeps packed, with scales across the"
            " cuts; use parallel=fsdp or pipeline, or tuning=lora"
        )
    if DType.float64 in (config.precision.param_dtype, config.precision.master_dtype):
        yield "precision=fp64: bitsandbytes unpacks 4-bit weights to 16 or 32 bits; use bf16, fp16 or fp32"


def check_frozen(config: Config, model: str, count: int, names: str) -> Iterator[str]:
    """A problem where parameters of the model get no gradient. count, names: of them."""
    if count and config.parallel.engine is EngineName.deepspeed and config.tuning.method is TuningMethod.full:
        yield (
            f"parallel.engine=deepspeed: {count} parameters of {model} get no gradient ({names}), and ZeRO would save"
            " none of them; use parallel=fsdp, or tuning=lora"
        )
