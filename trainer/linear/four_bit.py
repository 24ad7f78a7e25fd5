"""QLoRA's base: the frozen model in four bits, unpacked for each use.

    weight [out, in] ----> 64 values share a scale ----> 4-bit codes of NF4      0.5 bytes per value
    scales           ----> 256 share a scale       ----> 8-bit codes             0.0159 bytes per value (else 0.0625)
    each use         ----> the layer's whole matrix in precision.param_dtype, for a moment

bitsandbytes does the arithmetic. The linear layers of the decoder are quantized, from the source of `model.weights` and
unit by unit, so the model never exists as a whole in 16 bit. A layout that shards parameters divides the codes by rows;
every rank has all scales. Embedding, norms and head stay unchanged, and so do layers whose rows are not a whole number
of
blocks: bitsandbytes' CPU kernel unpacks those incorrectly. Tensor parallel divides codes and scales between blocks, so
scales must not be packed themselves (tuning.double_quantization=false). `four_bit_layers` has the layers. Dettmers et
al. 2023 (QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from configs.choices import DType, EngineName, TuningMethod
from configs.schema import Config
from trainer.linear.common import description, exported, fill, imitate, matmuls, owns, restore, settle  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEEPS_MODEL = False


def chosen(config: Config) -> bool:
    return config.tuning.method is TuningMethod.qlora


def problems(config: Config) -> Iterator[str]:
    """4-bit weights are packed bytes: computing on a part of a matrix unpacks whole blocks of it."""
    tuning, parallel = config.tuning, config.parallel
    if not chosen(config):
        if not tuning.double_quantization:
            yield (
                f"tuning.double_quantization=false: is for 4-bit weights, this is tuning={tuning.method}; set"
                " tuning=qlora, or leave it out"
            )
        return
    if parallel.engine is EngineName.deepspeed:
        yield "tuning=qlora: DeepSpeed casts and flattens parameters, and 4-bit ones cannot be; use parallel=fsdp"
    elif parallel.tp > 1 and tuning.double_quantization:
        yield (
            f"parallel.tp={parallel.tp}: cuts matrices, and tuning.double_quantization=true packs scales across the"
            " cuts; use tuning.double_quantization=false, or parallel=fsdp or pipeline"
        )
    if DType.float64 in (config.precision.param_dtype, config.precision.master_dtype):
        yield "precision=fp64: bitsandbytes unpacks 4-bit weights to 16 or 32 bits; use bf16, fp16 or fp32"


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    from trainer.linear.four_bit_layers import replace_linears

    replace_linears(model, config.tuning)


def report(model: PreTrainedModel) -> None:
    """The adapters, without which nothing would be trained, report for both."""


def identity(config: Config) -> dict[str, Any]:
    return {"tuning.double_quantization": config.tuning.double_quantization}


def traced(config: Config) -> Any:
    return config.tuning.double_quantization
