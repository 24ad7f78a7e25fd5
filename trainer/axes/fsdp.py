"""Fully sharded data parallel (FSDP2): each rank stores 1/W of every parameter, gradient and optimizer state.

    forward   layer i:   all-gather its parameters --> compute --> drop them      (or keep: reshard_after_forward=false)
    backward  layer i:   all-gather again --> compute --> reduce-scatter the gradient --> keep 1/W
    update               each rank its own 1/W; no communication

    rank 0 |w0|..|..|..|  --all-gather-->  |w0|w1|w2|w3|  --reduce-scatter-->  |g0|..|..|..|
    rank 1 |..|w1|..|..|                   on all ranks                        |..|g1|..|..|

Bytes per rank and step (P parameter bytes in param_dtype, G gradient bytes in reduce_dtype, one micro-batch):
(W - 1) / W * (2 P + G); with reshard_after_forward=false (P + G). DDP moves 2 (W - 1) / W * G.
The next layer's all-gather runs while this layer computes. Zhao et al. 2023 (PyTorch FSDP), Rajbhandari et al. 2020
(ZeRO).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fully_shard as engine
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from configs.choices import OffloadDevice
from configs.errors import ConfigError
from trainer.axes.gradients import scale
from trainer.axes.mesh import Meshes, fsdp_mesh
from trainer.axes.shard import in_order, shard_dim
from trainer.model.build import architecture, held_layers, tied_names
from trainer.model.precision import torch_dtype
from trainer.model.roles import Described
from trainer.plan.plan import Plan
from trainer.plan.views import View


def apply_fsdp(
    model: PreTrainedModel,
    plan: Plan,
    meshes: Meshes,
    described: Mapping[str, Described],
    *,
    returns_logits: bool = True,
) -> None:
    """Shard each decoder layer, the embedding and the head as separate groups, and the rest as the root. Parameters of
    another view than the dense one are nested groups.

    A group is gathered at once. Tied embeddings stay in the root group: a parameter has one owner. model: the whole
    model or one pipeline stage; only if it `returns_logits` is its output cast to the loss dtype. described: of the
    whole model. Raises ConfigError for parameters of which no part can stay between forward and backward.
    """
    _check_rows(model, plan, described)
    param_dtype, reduce_dtype = torch_dtype(plan.param_dtype), torch_dtype(plan.reduce_dtype)
    options: dict[str, Any] = {
        "mesh": fsdp_mesh(meshes.dense, plan.dense),
        "shard_placement_fn": partial(_placement, ranks=plan.fsdp_size),
        "reshard_after_forward": plan.reshard_after_forward and (plan.fsdp.reshard_size or True),
        "mp_policy": MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": _offload_policy(plan),
    }
    for module, view in _in_other_views(model, plan, described):
        other = {"mesh": fsdp_mesh(meshes.of(view), view), "shard_placement_fn": partial(_placement, ranks=view.shards)}
        fully_shard(module, **options | other)
    groups = sharded_modules(model)
    with _one_smaller_mesh() if plan.fsdp.reshard_size is not None else nullcontext():
        for module in groups.values():
            fully_shard(module, **options)
        # Only the root may cast its output: a layer's output must stay in the compute dtype of the next layer.
        if returns_logits:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype, reduce_dtype, output_dtype=_loss_dtype(plan))
        fully_shard(model, **options)
    gather_ahead(groups, plan)


def gather_ahead(groups: Mapping[str, nn.Module], plan: Plan) -> None:
    """Set the groups that each group prefetches, if the plan gives their number."""
    order = [cast(FSDPModule, groups[name]) for name in in_order(groups)]
    for place, module in enumerate(order):
        if (forward := plan.fsdp.forward_prefetch) is not None:
            module.set_modules_to_forward_prefetch(order[place + 1 :][:forward])
        if (backward := plan.fsdp.backward_prefetch) is not None:
            module.set_modules_to_backward_prefetch(order[max(0, place - backward) : place][::-1])


def _check_rows(model: PreTrainedModel, plan: Plan, described: Mapping[str, Described]) -> None:
    """torch 2.13 can keep a part on fewer ranks only for parameters that are divided along rows."""
    fewer, ranks = plan.fsdp.reshard_size, plan.fsdp_size
    if fewer is None or fewer == ranks:
        return
    if any(shard_dim(about.shape, about.shape, ranks) for about in described.values()):
        raise ConfigError(
            f"parallel.fsdp.reshard_size={fewer}: {ranks} ranks do not divide the experts of {architecture(model)};"
            " their features are cut instead, of which FSDP2 keeps no part; leave it out"
        )


def _one_smaller_mesh() -> AbstractContextManager[object]:
    """For `reshard_size`: torch makes a mesh for each sharded module, all of the same ranks. NCCL would create two
    communicators for each, some GiB for a model with many layers."""
    make: Callable[[int, Any], Any] = engine._get_post_forward_mesh_info  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    made: dict[tuple[int, Any], Any] = {}

    def once(size: int, info: Any) -> Any:
        key = size, info.mesh
        if key not in made:
            made[key] = make(size, info)
        return made[key]

    return patch.object(engine, "_get_post_forward_mesh_info", once)


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return Shard(shard_dim(local.shape, parameter.shape, ranks))


def _in_other_views(
    model: nn.Module, plan: Plan, described: Mapping[str, Described]
) -> Iterator[tuple[nn.Module, View]]:
    """Modules whose own parameters are all divided along the axes of one view other than the dense one."""
    for name, module in model.named_modules():
        own = [leaf for leaf, parameter in module._parameters.items() if parameter is not None]
        views = {plan.view(described[f"{name}.{leaf}"].view).name for leaf in own} - {plan.dense.name}
        if views:
            view = plan.view(views.pop())
            assert not views and all(plan.view(described[f"{name}.{leaf}"].view) is view for leaf in own), name
            yield module, view


def average_gradients(parameters: Mapping[str, torch.Tensor], plan: Plan, described: Mapping[str, Described]) -> None:
    """FSDP2 averages over the ranks that hold a parameter, and the loss assumes the average over those that hold a
    dense one. If their numbers differ, the remaining factor is applied once per step.

    `set_gradient_divide_factor` would apply it at each reduction, but over one rank torch 2.13 divides twice in float16
    and float64, gloo has no sum with a factor, and NCCL's zeroes bfloat16 (pytorch issue 190747).
    """
    for view in plan.views:
        if (factor := view.holders / plan.averaged) != 1:
            here = [p for name, p in parameters.items() if plan.view(described[name].view) is view]
            scale([p.grad for p in here if p.grad is not None], factor)


def sharded_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The groups besides the root: this stage's layers as "0", "1", ..., and "embedding" and "head". Layers that share
    a parameter (Zamba's attention) stay in the root group."""
    layers = held_layers(model)
    owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    named: dict[str, nn.Module] = {
        str(place): layer
        for place, layer in enumerate(layers)
        if all(owners[id(parameter)] == 1 for parameter in layer.parameters())
    }
    if not tied_names(model):
        ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        named |= {name: end for name, end in ends.items() if end is not None and any(True for _ in end.parameters())}
    return named


def set_last_micro_batch(model: FSDPModule, plan: Plan, *, last: bool) -> None:
    """When gradients are communicated. Sharded gradients are reduce-scattered after every micro-batch: kept unsharded
    until the last one, they would take a full copy per rank. Replicas all-reduce once, after the last."""
    if plan.fsdp_size > 1:
        model.set_requires_all_reduce(last)
    else:
        model.set_requires_gradient_sync(last)


def _offload_policy(plan: Plan) -> OffloadPolicy:
    if plan.offload_parameters is OffloadDevice.none:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=plan.device == "cuda")


def _loss_dtype(plan: Plan) -> torch.dtype:
    return torch.promote_types(torch_dtype(plan.param_dtype), torch.float32)
