"""Linear layers that multiply in float8. The model gets them, on the meta device, before any pass divides it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from configs.choices import Recipe
from configs.errors import ConfigError, EnvironmentProblem
from configs.schema import Float8
from trainer.linear.adapter_targets import is_router, kinds
from trainer.linear.common import divides
from trainer.model.layers import EightBits, is_plain_linear
from trainer.model.roles import routed_parts

log = logging.getLogger(__name__)
KEY = "precision.float8"
LOWEST, MX_LOWEST = (8, 9), (10, 0)
NOISY = ("torchao", "torch.utils._pytree")


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns, in every process, of kernels that are built for another Python."""
    levels = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


with _quiet():
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear
    from torchao.float8.float8_utils import amax_to_scale
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor
    from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference


class Linear8(EightBits, Float8Linear):
    """torchao's layer, which casts its input only under CUDA's autocast."""

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        if not isinstance(weight, WeightWithDynamicFloat8CastTensor):
            return weight
        weight._precomputed_scale = weight._tensor.new_ones((), dtype=torch.float32)
        codes, scale = weight.fsdp_pre_all_gather(None)
        found = weight.fsdp_post_all_gather(codes, scale, weight.dtype)
        assert found is not None  # only if it writes into a given tensor
        return found[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        output = super().forward(input)
        # torchao returns a view of the product, on whose hooks FSDP2 cannot rely.
        return torch.ops.aten._unsafe_view.default(output, output.shape)


class LinearMX(EightBits, nn.Linear):
    """Blocks of 32 values along each matmul's inner dimension share a scale that is a power of two."""

    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, device = self.weight, input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
        kernels = KernelPreference.AUTO if input.is_cuda else KernelPreference.EMULATED
        output = _to_mxfp8_then_scaled_mm(input, weight, kernels, ScaleCalculationMode.RCEIL)
        output = torch.ops.aten._unsafe_view.default(output, output.shape)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def convert_layers(model: PreTrainedModel, float8: Float8, *, block: int, gathered: bool) -> None:
    """Replace the layers that can multiply in float8, in place.

    block: required divisor of both dimensions of a matrix. gathered: FSDP2 gathers their weights in float8. Raises
    ConfigError for a model without such layers, and for names that match none.
    """
    head, routed = model.get_output_embeddings(), routed_parts(model)
    linears = {name: module for name, module in model.named_modules() if is_plain_linear(module)}
    problems = [
        f"{KEY}.exclude={float8.exclude}: {entry} matches no linear layer of {type(model).__name__}; it has"
        f" {', '.join(kinds(linears))}"
        for entry in float8.exclude
        if not any(_named(name, entry) for name in linears)
    ]
    if float8.head and (head is None or head.weight is model.get_input_embeddings().weight):
        problems.append(
            f"{KEY}.head=true: the head of {type(model).__name__} shares its matrix with the embedding; set it to false"
        )
    body = {
        name
        for name, module in linears.items()
        if module is not head
        and module.weight.requires_grad
        and id(module.weight) not in routed
        and not is_router(model, name)
        and not any(_named(name, entry) for entry in float8.exclude)
        and divides(module.weight.shape, block)
    }
    ends = {
        name
        for name, module in linears.items()
        if float8.head and module is head and divides(module.weight.shape, block)
    }
    if not body:
        problems.append(
            f"{KEY}.recipe={float8.recipe}: {type(model).__name__} has no torch.nn.Linear that may be converted, with"
            f" dimensions that are multiples of {block}; use precision=bf16"
        )
    if problems:
        raise ConfigError(*problems)
    if float8.recipe is Recipe.mxfp8:
        for name in body | ends:
            model.get_submodule(name).__class__ = LinearMX
        return
    config = Float8LinearConfig.from_recipe_name(str(float8.recipe))
    # The head is a separate group for FSDP2, and gloo cannot gather a group that is entirely float8.
    for names, wrapped in ((body, gathered), (ends, False)):
        chosen = dataclasses.replace(config, enable_fsdp_float8_all_gather=wrapped)
        convert_to_float8_training(model, module_filter_fn=lambda _, name, names=names: name in names, config=chosen)
    for name in body | ends:
        model.get_submodule(name).__class__ = Linear8


def log_layers(model: PreTrainedModel) -> None:
    """Log which linear layers multiply in float8 and which do not."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    converted = [name for name, module in linears.items() if isinstance(module, Linear8 | LinearMX)]
    left = [name for name in linears if name not in converted]
    log.info("float8: %d of %d linear layers: %s", len(converted), len(linears), ", ".join(kinds(converted)))
    if left:
        log.info("float8: left in the compute dtype: %s", ", ".join(kinds(left)))


def check_device(name: str, capability: tuple[int, int], *, blocks: bool = False) -> None:
    """Raise EnvironmentProblem for a GPU whose tensor cores do not multiply in float8. name: torch's name for it.
    blocks: with a scale for each 32 values."""
    if blocks and capability < MX_LOWEST:
        raise EnvironmentProblem(
            f"{KEY}.recipe=mxfp8: {name} has no unit for it (compute capability {'.'.join(map(str, capability))}); use"
            " tensorwise or rowwise, or a GPU of 10.0 or later (Blackwell)"
        )
    if capability < LOWEST:
        raise EnvironmentProblem(
            f"{KEY}: {name} has no unit for float8 (compute capability {'.'.join(map(str, capability))}); use"
            " precision=bf16, or a GPU of 8.9 or later (Ada, Hopper, Blackwell)"
        )


def compute_scales(modules: Iterable[nn.Module]) -> None:
    """The scales of all weights that FSDP2 will gather in float8, from one all-reduce per axis instead of one per
    weight. They are those of whole matrices, whereas each gathering would know only the part that tensor parallel left.
    """
    for module in modules:
        device = next(module.parameters()).device
        if device.type == "cuda" and torch.version.hip is None:
            blocks = any(isinstance(layer, LinearMX) for layer in module.modules())
            check_device(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), blocks=blocks)
        weights = [layer.weight for layer in module.modules() if isinstance(layer, Linear8)]
        held = [w._local_tensor for w in weights if isinstance(w, DTensor)]
        held = [piece for piece in held if isinstance(piece, WeightWithDynamicFloat8CastTensor)]
        mesh = next((w.device_mesh for w in weights if isinstance(w, DTensor)), None)
        # Offloaded weights are where their mesh does not communicate; they get their scales when they are gathered.
        if not held or mesh is None or held[0].device.type != mesh.device_type:
            continue
        pieces = [piece._tensor.detach() for piece in held]
        largest = torch.stack([piece.abs().amax() if piece.numel() else piece.new_zeros(()) for piece in pieces])
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
        for piece, scale in zip(held, amax_to_scale(largest, held[0]._dtype), strict=True):
            piece._precomputed_scale = scale


def _named(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")
