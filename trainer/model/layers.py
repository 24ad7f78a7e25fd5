"""Layers and their parameters, for code that replaces, divides or fills them: what is linear, what a parameter holds.

A parameter may be more than numbers: its tensor's type says how a layer computes with it (for example a weight that is
gathered in float8). Code that replaces a parameter calls `holding` for the new one, which keeps that type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from trainer.model.pieces import local_share

READ_DIRECTLY = "_cookbook_read_directly"


class PackedWeight(nn.Module, ABC):
    """Base of a layer whose `weight` is stored in another form than its values.

    The parameter has the packed shape from the start, since ranks divide that shape.
    """

    @abstractmethod
    def values_shape(self, packed: torch.Size) -> torch.Size:
        """Number of values in a weight of this shape, or in a rank's piece of it."""

    @abstractmethod
    def entries(self, dim: int) -> int:
        """Number of entries of the weight along a dimension that must stay together."""

    @abstractmethod
    def divide(self, weight: DTensor) -> None:
        """From now on the layer computes with this rank's piece of its weight, in this placement."""

    @abstractmethod
    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """The stored form of the whole weight; the layer keeps the other data needed to read it."""

    @abstractmethod
    def packed_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor that replaces the weight. The first is the parameter; the rest is never sharded."""

    @abstractmethod
    def imitate(self, dtype: torch.dtype) -> torch.Tensor:
        """`pack` without values, under fake tensors. dtype: the layer's compute dtype from here on."""


class EightBits(nn.Module, ABC):
    """Base of a layer whose `weight` is multiplied in float8, in whatever form it is stored."""

    @abstractmethod
    def gathered(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight after FSDP2's gathering; the same tensor if FSDP2 accepts it unchanged."""


def gathered_width(parameter: torch.Tensor) -> int:
    """Bytes per value of a tensor that FSDP2 gathers in another form than the compute dtype; 0 for the others."""
    return int(hasattr(parameter, "fsdp_pre_all_gather"))


def is_packed(module: nn.Module | None, leaf: str) -> TypeGuard[PackedWeight]:
    return leaf == "weight" and isinstance(module, PackedWeight)


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each parameter once: its name, the module that holds it, its name there, itself."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        yield name, model.get_submodule(owner), leaf, parameter


def values_shape(module: nn.Module, leaf: str, parameter: torch.Tensor) -> torch.Size:
    """Shape of the values that a parameter represents."""
    return module.values_shape(parameter.shape) if is_packed(module, leaf) else parameter.shape


def is_linear(module: object) -> TypeGuard[nn.Linear | Conv1D]:
    return isinstance(module, nn.Linear | Conv1D)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether the model calls the layer, and its forward has not been replaced yet."""
    return type(module) is nn.Linear and not hasattr(module, READ_DIRECTLY)


def computes_linearly(module: object) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether the model calls the layer for `x W + b` and nothing else, so that an addition to it applies once."""
    alone = isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)
    return (alone or isinstance(module, PackedWeight)) and not hasattr(module, READ_DIRECTLY)


def mark_read_directly(model: nn.Module, names: Collection[str]) -> None:
    """Protect the layers of these weight names from replacement: the model's code multiplies by the weight itself."""
    for name in names:
        setattr(model.get_submodule(name.rpartition(".")[0]), READ_DIRECTLY, True)


def is_transposed(module: object) -> TypeGuard[Conv1D]:
    """Whether the weight is stored [in, out], as in GPT-2's layers."""
    return isinstance(module, Conv1D)


def holding(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """The replacement of `parameter`: of its type and, if it is a DTensor, of its placement, with this rank's part of
    `values`, which are complete, the same on every rank and of any dtype and device."""
    if isinstance(parameter, DTensor):
        # Every rank has the same complete values: dividing them needs no communication.
        part = of_type(parameter.to_local(), local_share(values, parameter).clone())
        mesh, placements = parameter.device_mesh, parameter.placements
        values = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    else:
        values = of_type(parameter.detach(), values)
    return as_parameter(parameter, values)


def of_type(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` in a tensor of the other's type, which provides the constructor."""
    if type(tensor) in (torch.Tensor, nn.Parameter, type(values)):
        return values
    return tensor.new_zeros(values.shape, dtype=values.dtype, device=values.device).copy_(values)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor, without the type that says how a layer computes with them. Shares its memory."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor
    inner, _ = tensor.__tensor_flatten__()
    return getattr(tensor, inner[0])


def as_parameter(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """`values` as a parameter of the same class and attributes, trained or not."""
    kind = type(parameter)
    if kind is nn.Parameter or not issubclass(kind, nn.Parameter):
        return nn.Parameter(values, requires_grad=parameter.requires_grad)
    made = nn.Parameter.__new__(kind, values, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made
