"""QLoRA: the frozen model in four bits, taken out of them again for each use.

    weight [out, in] ----> 64 values share a scale ----> 4-bit codes of NF4      0.5 bytes per value
    scales           ----> 256 share a scale       ----> 8-bit codes             0.0159 bytes per value (else 0.0625)
    each use         ----> the layer's whole matrix in precision.param_dtype, for a moment

bitsandbytes does the arithmetic. The linear layers of the decoder are quantized, from what `model.weights` says and
unit by unit, so that the model never exists whole in 16 bit. Embedding, norms and head stay as they are, and so do
layers whose rows are no whole number of blocks: bitsandbytes' kernel for the CPU unpacks those wrongly.
Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError, EnvironmentProblem
from configs.schema import Tuning
from trainer.model import decoder_layers

KIND, BLOCK, SCALES = "nf4", 64, 256
"""Values that share a scale; scales that share one."""


def replace_linears(model: PreTrainedModel, tuning: Tuning) -> None:
    """Put 4-bit layers, still on the meta device and of whole shape, in the place of the decoder's linear ones.

    Raises ConfigError for a model that has none, EnvironmentProblem without bitsandbytes.
    """
    kind, replaced = _layer_class(), 0
    for layer in decoder_layers(model):
        for name, linear in [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]:
            if linear.in_features % BLOCK:
                continue
            quantized = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
            # Plain, until it is packed: bitsandbytes' own kind of parameter cannot be copied on the meta device.
            quantized.weight = nn.Parameter(linear.weight.data, requires_grad=False)
            quantized.double_quantization = tuning.double_quantization
            layer.set_submodule(name, quantized)
            replaced += 1
    if not replaced:
        raise ConfigError(
            f"tuning=qlora: the decoder layers of {type(model).__name__} have no torch.nn.Linear with a multiple of"
            f" {BLOCK} inputs, so nothing to quantize; use tuning=lora"
        )


def quantize(unit: nn.Module) -> None:
    """Quantize the 4-bit layers of a unit that has just been filled, in the dtype in which it was."""
    from bitsandbytes.nn.modules import Params4bit

    for layer in unit.modules():
        if is_quantized(layer, "weight"):
            whole = layer.get_parameter("weight").data
            _set_compute_dtype(layer, whole.dtype)
            options: dict[str, Any] = {"module": layer, "quant_type": KIND}
            options["compress_statistics"] = layer.double_quantization
            packed: Any = Params4bit(whole, requires_grad=False, **options)
            layer._parameters["weight"] = packed.to(whole.device)


def is_quantized(module: nn.Module, leaf: str) -> bool:
    """Whether this parameter of the module is, or will be, in 4 bits."""
    return leaf == "weight" and hasattr(module, "quant_state")


def stored_bytes(layer: Any) -> tuple[int, ...]:
    """Bytes of each tensor that takes a 4-bit weight's place: codes, scales, and what the scales are read with.

    layer: as `replace_linears` made it.
    """
    count = layer.weight.numel()
    codes, blocks, table = count // 2, count // BLOCK, 16 * 4
    if not layer.double_quantization:
        return codes, 4 * blocks, table
    return codes, blocks, 4 * -(-blocks // SCALES), 4, table, 256 * 4


def packed_like(layer: Any, dtype: torch.dtype) -> nn.Parameter:
    """A weight with the shapes of a quantized one and no values: what a trace under fake tensors needs.

    layer: as `replace_linears` made it. dtype: in which it computes from here on.
    """
    from bitsandbytes.functional import QuantState

    _set_compute_dtype(layer, dtype)
    shape, count = layer.weight.shape, layer.weight.numel()
    blocks = count // BLOCK
    known: dict[str, Any] = {"shape": shape, "code": torch.empty(16), "blocksize": BLOCK, "quant_type": KIND}
    wide: dict[str, Any] = {"code": torch.empty(256), "blocksize": SCALES, "dtype": torch.float32}
    scales = QuantState(absmax=torch.empty(-(-blocks // SCALES)), **wide)
    nested = {"offset": torch.empty(()), "state2": scales} if layer.double_quantization else {}
    kind = torch.uint8 if nested else torch.float32
    state = QuantState(absmax=torch.empty(blocks, dtype=kind), dtype=dtype, **known, **nested)
    packed: Any = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = state
    return packed


def _set_compute_dtype(layer: Any, dtype: torch.dtype) -> None:
    layer.compute_dtype, layer.compute_type_is_set = dtype, True
    # On some CPUs a validation would turn the weights into a format for inference alone, and round their scales.
    layer.support_avx512bf16_for_cpu = False


def _layer_class() -> type[Any]:
    """Raises EnvironmentProblem."""
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError:
        raise EnvironmentProblem(
            "tuning=qlora: needs bitsandbytes; pip install 'distributed-training-cookbook[tuning]'"
        ) from None
    return Linear4bit
