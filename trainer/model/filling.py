"""A model on the meta device gets memory and values, unit by unit: embedding, each decoder layer, norm, head.

A sharding engine partitions each unit as soon as it is filled, so that no rank ever holds the whole model. Where the
values come from: `weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from trainer.model.build import decoder_layers, tied_names
from trainer.model.layers import holding, is_packed, values_shape


class WeightSource(Protocol):
    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        """Write the values of the parameters `keys` of `unit`; `name` is the unit's place in the model."""
        ...


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts that are filled and partitioned one after another, in model order: each decoder layer as a whole, and
    around them the smallest modules that own parameters."""
    layers = {id(layer) for layer in decoder_layers(model)}

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in layers or module._parameters:
            yield name, module
        else:
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def materialize(
    model: PreTrainedModel,
    weights: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    frozen_dtype: torch.dtype | None = None,
    after_unit: Callable[[nn.Module], None] | None = None,
) -> None:
    """Allocate every parameter on `device` in `dtype` and fill it from `weights`, unit by unit.

    frozen_dtype: dtype of frozen parameters; default: `dtype`.

    A parameter that is sharded already (a DTensor on meta) gets this rank's part of the value; the whole unit exists
    only while it is filled. after_unit: called with each filled unit before the next one is allocated; an engine that
    shards real tensors partitions it there. Tied parameters stay one object: the first name that owns them is filled,
    the others refer to it.
    """
    ties = tied_names(model)
    with torch.no_grad():
        for name, unit in units(model):
            prefix = f"{name}." if name else ""
            targets = {
                key: parameter
                for key, parameter in unit.named_parameters(remove_duplicate=False)
                if parameter.is_meta and prefix + key not in ties
            }
            if not targets:
                continue
            _fill_unit(name, unit, targets, weights, device=device, dtype=dtype, frozen=frozen_dtype or dtype)
            for alias, owner in ties.items():
                if owner.startswith(prefix) and owner[len(prefix) :] in targets:
                    _set_parameter(model, alias, model.get_parameter(owner))
            if after_unit is not None:
                after_unit(unit)
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _fill_unit(
    name: str,
    unit: nn.Module,
    targets: dict[str, nn.Parameter],
    weights: WeightSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    frozen: torch.dtype,
) -> None:
    """Whole values into fresh tensors, then each target's share of them into place, in the layer's storage format."""
    # float32 first: a random value must not depend on the dtype it is stored in.
    wide = torch.promote_types(dtype, torch.float32)
    for key, target in targets.items():
        shape = values_shape(*_place(unit, key), target)
        _set_parameter(unit, key, nn.Parameter(torch.empty(shape, dtype=wide, device=device)))
    weights.fill(name, unit, list(targets))
    for key, target in targets.items():
        whole = unit.get_parameter(key).data.to(dtype if target.requires_grad else frozen)
        owner, leaf = _place(unit, key)
        _set_parameter(unit, key, holding(target, owner.pack(whole) if is_packed(owner, leaf) else whole))


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, leaf = _place(module, name)
    owner._parameters[leaf] = parameter


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter of this name, and its name there."""
    owner, _, leaf = name.rpartition(".")
    return module.get_submodule(owner), leaf
