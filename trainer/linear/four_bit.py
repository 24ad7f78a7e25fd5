"""QLoRA: the frozen model in four bits, taken out of them again for each use.

    weight [out, in] ----> 64 values share a scale ----> 4-bit codes of NF4      0.5 bytes per value
    scales           ----> 256 share a scale       ----> 8-bit codes             0.0159 bytes per value (else 0.0625)
    each use         ----> the layer's whole matrix in precision.param_dtype, for a moment

bitsandbytes does the arithmetic. The linear layers of the decoder are quantized, from what `model.weights` says and
unit by unit, so that the model never exists whole in 16 bit. A layout that shards parameters cuts the codes by rows;
the scales every rank has whole. Embedding, norms and head stay as they are, and so do layers whose rows are no whole
number of blocks: bitsandbytes' kernel for the CPU unpacks those wrongly.
Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 3).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError, EnvironmentProblem
from configs.schema import Tuning
from trainer.model.build import decoder_layers

KIND, BLOCK, SCALES = "nf4", 64, 256
"""Values that share a scale; scales that share one."""


class Linear4bit(nn.Linear):
    """A frozen linear layer of codes [out, in / 2] and, apart from them, what they are read with.

    bitsandbytes' own layer has both in one parameter of a kind of its own, in one column: gathered by FSDP2 it would
    have lost the scales, and a rank's share would be no rows.
    """

    def __init__(self, linear: nn.Linear, *, double_quantization: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = nn.Parameter(linear.weight.data, requires_grad=False)
        self.double_quantization = double_quantization
        self.quant_state: Any = None

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """values: [out, in], in the dtype in which the layer is to compute. Returns the codes, [out, in / 2]."""
        from bitsandbytes.functional import quantize_4bit

        nested = self.double_quantization
        codes, self.quant_state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=nested, quant_type=KIND)
        return codes.view(self.out_features, self.in_features // 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]

        state = self.quant_state
        if state is None:
            # Of whole shape still: looked at for shapes and costs.
            return super().forward(input)
        if state.absmax.device != input.device:
            # Quantized where offloaded parameters live.
            state.to(input.device)
        bias = None if self.bias is None else self.bias.to(state.dtype)
        return matmul_4bit(input.to(state.dtype), self.weight, state, bias=bias).to(input.dtype)


def replace_linears(model: PreTrainedModel, tuning: Tuning) -> None:
    """Put 4-bit layers, still on the meta device and of whole shape, in the place of the decoder's linear ones.

    Raises ConfigError for a model that has none, EnvironmentProblem without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(
            "tuning=qlora: needs bitsandbytes; pip install 'distributed-training-cookbook[tuning]'"
        )
    replaced = 0
    for layer in decoder_layers(model):
        for name, linear in [(name, module) for name, module in layer.named_modules() if type(module) is nn.Linear]:
            if linear.in_features % BLOCK:
                continue
            layer.set_submodule(name, Linear4bit(linear, double_quantization=tuning.double_quantization))
            replaced += 1
    if not replaced:
        raise ConfigError(
            f"tuning=qlora: the decoder layers of {type(model).__name__} have no torch.nn.Linear with a multiple of"
            f" {BLOCK} inputs, so nothing to quantize; use tuning=lora"
        )


def expect_codes(model: nn.Module) -> None:
    """Give the 4-bit layers of a model on the meta device the shape of their codes: what ranks divide among them."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            codes = torch.empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8, device="meta")
            layer._parameters["weight"] = nn.Parameter(codes, requires_grad=False)


def is_quantized(module: nn.Module, leaf: str) -> TypeGuard[Linear4bit]:
    """Whether this parameter of the module is, or will be, in 4 bits."""
    return leaf == "weight" and isinstance(module, Linear4bit)


def stored_bytes(layer: Linear4bit) -> tuple[int, ...]:
    """Bytes of each tensor that takes a 4-bit weight's place: codes, scales, and what the scales are read with."""
    count = layer.out_features * layer.in_features
    codes, blocks, table = count // 2, count // BLOCK, 16 * 4
    if not layer.double_quantization:
        return codes, 4 * blocks, table
    return codes, blocks, 4 * -(-blocks // SCALES), 4, table, 256 * 4


def packed_like(layer: Linear4bit, dtype: torch.dtype) -> nn.Parameter:
    """A weight with the shape of a quantized one and no values, and `layer` made to compute with it: what a trace under
    fake tensors needs.

    dtype: in which it computes from here on.
    """
    from bitsandbytes.functional import QuantState

    shape = torch.Size((layer.out_features, layer.in_features))
    blocks = shape.numel() // BLOCK
    known: dict[str, Any] = {"shape": shape, "code": torch.empty(16), "blocksize": BLOCK, "quant_type": KIND}
    wide: dict[str, Any] = {"code": torch.empty(256), "blocksize": SCALES, "dtype": torch.float32}
    scales = QuantState(absmax=torch.empty(-(-blocks // SCALES)), **wide)
    nested = {"offset": torch.empty(()), "state2": scales} if layer.double_quantization else {}
    kind = torch.uint8 if nested else torch.float32
    layer.quant_state = QuantState(absmax=torch.empty(blocks, dtype=kind), dtype=dtype, **known, **nested)
    return nn.Parameter(torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8), requires_grad=False)
