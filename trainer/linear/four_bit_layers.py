"""Linear layers of 4-bit codes: the model gets them, on the meta device, before any pass divides it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from configs.errors import ConfigError, EnvironmentProblem
from configs.schema import Tuning
from trainer.model.build import decoder_layers
from trainer.model.layers import PackedWeight, is_plain_linear
from trainer.model.pieces import local_share

KIND, BLOCK, SCALES = "nf4", 64, 256
"""Number of values that share a scale; number of scales that share one."""


class Linear4bit(PackedWeight, nn.Linear):
    """A frozen linear layer of codes [out, in / 2] and, stored separately, the scales to read them with.

    bitsandbytes' own layer has both in one parameter of its own class, in one column: gathered by FSDP2 it would lose
    the scales, and a rank's share would not be rows.
    """

    def __init__(self, linear: nn.Linear, *, double_quantization: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        codes = torch.empty(linear.out_features, linear.in_features // 2, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.double_quantization = double_quantization
        self.quant_state: Any = None
        self.divided: DTensor | None = None

    def values_shape(self, packed: torch.Size) -> torch.Size:
        return torch.Size((packed[0], 2 * packed[1]))

    def entries(self, dim: int) -> int:
        return BLOCK // 2 if dim == 1 else 1

    def divide(self, weight: DTensor) -> None:
        self.divided = weight

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """values: in the layer's compute dtype. Returns the codes."""
        from bitsandbytes.functional import quantize_4bit

        nested = self.double_quantization
        codes, state = quantize_4bit(values, blocksize=BLOCK, compress_statistics=nested, quant_type=KIND)
        if self.divided is not None:
            # Codes are divided between blocks, so that scales can be divided too. A copy, not a view of all scales.
            scales = local_share(state.absmax.view(self.out_features, -1), self.divided)
            state.absmax, state.shape = scales.clone(memory_format=torch.contiguous_format).flatten(), self._piece()
        self.quant_state = state
        return codes.view(self.out_features, self.in_features // 2)

    def _piece(self) -> torch.Size:
        """Number of this rank's values."""
        if self.divided is None:
            return torch.Size((self.out_features, self.in_features))
        return self.values_shape(self.divided.to_local().shape)

    def packed_bytes(self) -> tuple[int, ...]:
        """Codes, scales, and the data to read the scales with."""
        count = self._piece().numel()
        codes, blocks, table = count // 2, count // BLOCK, 16 * 4
        if not self.double_quantization:
            return codes, 4 * blocks, table
        return codes, blocks, 4 * -(-blocks // SCALES), 4, table, 256 * 4

    def imitate(self, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import QuantState

        shape = self._piece()
        blocks = shape.numel() // BLOCK
        known: dict[str, Any] = {"shape": shape, "code": torch.empty(16), "blocksize": BLOCK, "quant_type": KIND}
        wide: dict[str, Any] = {"code": torch.empty(256), "blocksize": SCALES, "dtype": torch.float32}
        scales = QuantState(absmax=torch.empty(-(-blocks // SCALES)), **wide)
        nested = {"offset": torch.empty(()), "state2": scales} if self.double_quantization else {}
        kind = torch.uint8 if nested else torch.float32
        self.quant_state = QuantState(absmax=torch.empty(blocks, dtype=kind), dtype=dtype, **known, **nested)
        return torch.empty(shape[0], shape[1] // 2, dtype=torch.uint8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]

        state = self.quant_state
        if state.absmax.device != input.device:
            # Quantized on the device of offloaded parameters.
            state.to(input.device)
        bias = None if self.bias is None else self.bias.to(state.dtype)
        return matmul_4bit(input.to(state.dtype), self.weight, state, bias=bias).to(input.dtype)


def replace_linears(model: PreTrainedModel, tuning: Tuning) -> None:
    """Replace the decoder's linear layers by 4-bit layers, still on the meta device.

    Raises ConfigError for a model without any, EnvironmentProblem without bitsandbytes.
    """
    if find_spec("bitsandbytes") is None:
        raise EnvironmentProblem(
            "tuning=qlora: needs bitsandbytes; pip install 'distributed-training-cookbook[tuning]'"
        )
    replaced = 0
    for layer in decoder_layers(model):
        for name, linear in list(layer.named_modules()):
            if is_plain_linear(linear) and linear.in_features % BLOCK == 0:
                layer.set_submodule(name, Linear4bit(linear, double_quantization=tuning.double_quantization))
                replaced += 1
    if not replaced:
        raise ConfigError(
            f"tuning=qlora: the decoder layers of {type(model).__name__} have no torch.nn.Linear with a multiple of"
            f" {BLOCK} inputs, so nothing to quantize; use tuning=lora"
        )
