"""Layers and their parameters, for those that replace, cut or fill them: what is linear, and what a parameter holds.

A parameter may be more than numbers: its tensor's type says how a layer computes with it (a weight that is gathered in
float8, say). Whoever exchanges a parameter asks `holding` for the new one, which keeps that type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from trainer.model.pieces import cut


class PackedWeight(nn.Module, ABC):
    """Base of a layer whose `weight` is stored in another form than the values that it computes with.

    The parameter has the packed shape from the start, since that is what ranks divide among them.
    """

    @abstractmethod
    def values_shape(self) -> torch.Size: ...

    @abstractmethod
    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """The stored form of the whole weight; the layer keeps what it needs besides to read it."""

    @abstractmethod
    def packed_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor that takes the weight's place. The first is the parameter; the rest is never divided."""

    @abstractmethod
    def imitate(self, dtype: torch.dtype) -> torch.Tensor:
        """`pack` without values, under fake tensors. dtype: in which the layer computes from here on."""


def is_packed(module: nn.Module | None, leaf: str) -> TypeGuard[PackedWeight]:
    return leaf == "weight" and isinstance(module, PackedWeight)


def owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each parameter once: its name, the module that holds it, its name there, itself."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        yield name, model.get_submodule(owner), leaf, parameter


def values_shape(module: nn.Module, leaf: str, parameter: torch.Tensor) -> torch.Size:
    """Shape of the values that a parameter stands for."""
    return module.values_shape() if is_packed(module, leaf) else parameter.shape


def is_linear(module: object) -> TypeGuard[nn.Linear | Conv1D]:
    return isinstance(module, nn.Linear | Conv1D)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether nothing has given the layer a forward of its own yet."""
    return type(module) is nn.Linear


def is_transposed(module: object) -> TypeGuard[Conv1D]:
    """Whether the weight is stored [in, out], as GPT-2's layers have it."""
    return isinstance(module, Conv1D)


def holding(parameter: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """What takes the place of `parameter`: of its type and, if it is a DTensor, of its placement, with this rank's part
    of `values`, which are whole, the same on every rank and of any dtype and device."""
    if isinstance(parameter, DTensor):
        # Every rank has the same whole values: cutting them needs no communication.
        part = of_type(parameter.to_local(), cut(values, parameter).clone())
        mesh, placements = parameter.device_mesh, parameter.placements
        values = DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    else:
        values = of_type(parameter.detach(), values)
    return as_parameter(parameter, values)


def of_type(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` in a tensor of the other's type, which itself says how one like it is made."""
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
    """`values` as a parameter of the same class, attributes and kind, trained or not."""
    kind = type(parameter)
    if kind is nn.Parameter or not issubclass(kind, nn.Parameter):
        return nn.Parameter(values, requires_grad=parameter.requires_grad)
    made = nn.Parameter.__new__(kind, values, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made
