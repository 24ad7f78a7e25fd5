"""ZeRO 1 and 2 over tensor parallel: the facts that DeepSpeed needs about a model with divided matrices.

    4 ranks, dp_shard 2 x tp 2          tp 0         tp 1
                            dp_shard 0  W[:, left]   W[:, right]     rows: tensor parallel, as under the torch engine
                            dp_shard 1  W[:, left]   W[:, right]     columns: ZeRO partitions what a tp rank has left

`parallel.tensor` makes the division, so its collectives and its self-check are the same under both engines. Then the
parts become plain parameters, the only kind that ZeRO can flatten, and DeepSpeed gets the two groups. It averages
gradients and partitions states over the columns, and adds the squares of the norm over the rows, those of an undivided
parameter once. Stage 3 of DeepSpeed would gather and partition inside the regions; FSDP2 does that already.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from trainer.axes import SHARD, TENSOR
from trainer.axes.tensor.apply import TensorParallel


def model_parallel_unit(mesh: DeviceMesh) -> SimpleNamespace:
    """The groups of a rank, under the names that DeepSpeed took over from Megatron-LM."""
    unit = SimpleNamespace()
    for name, group in (("model", mesh.get_group(TENSOR)), ("data", mesh.get_group(SHARD))):
        answers = {"group": group, "rank": dist.get_rank(group), "world_size": dist.get_world_size(group)}
        answers["group_ranks"] = dist.get_process_group_ranks(group)
        for what, answer in answers.items():
            setattr(unit, f"get_{name}_parallel_{what}", partial(_same, answer))
    return unit


def _same(answer: object) -> object:
    return answer


@dataclass(frozen=True, slots=True)
class Cut:
    """Position of a rank's part in the whole parameter."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def around(self, part: torch.Tensor) -> DTensor:
        """View `part` (of this rank, any dtype) as a part of the whole. Shares memory with it."""
        return DTensor.from_local(part, self.mesh, self.placements, shape=self.shape, stride=self.stride)


def make_plain(model: nn.Module, tensor: TensorParallel) -> dict[str, Cut]:
    """Replace each DTensor parameter by this rank's part; tied ones stay tied. Returns how each was divided.

    Each backward completes the parameters that see only a part of their gradient, before DeepSpeed moves the gradient
    into its buckets: a hook sees only this micro-batch's gradient, so nothing is counted twice.
    """
    cuts = {name: _cut(parameter) for name, parameter in model.named_parameters()}
    parts: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            assert isinstance(parameter.data, DTensor)
            if id(parameter) not in parts:
                part = nn.Parameter(parameter.data.to_local(), requires_grad=parameter.requires_grad)
                # Read by DeepSpeed's norm: the squares of these are added up over the tensor-parallel ranks.
                vars(part)["tensor_model_parallel"] = not parameter.data.placements[0].is_replicate()
                # Keeps the DTensor's id from being reused while this runs.
                vars(part)["divided"] = parameter
                parts[id(parameter)] = part
            module._parameters[leaf] = parts[id(parameter)]
    for part in parts.values():
        del vars(part)["divided"]
    group, named = tensor.mesh.get_group(), dict(model.named_parameters())
    for name in tensor.partial:
        named[name].register_hook(lambda gradient: _summed(gradient, group))
    return cuts


def _cut(parameter: torch.Tensor) -> Cut:
    data = parameter.data
    assert isinstance(data, DTensor)
    return Cut(data.device_mesh, tuple(data.placements), data.shape, data.stride())


def _summed(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    gradient = gradient.contiguous().clone()
    dist.all_reduce(gradient, group=group)
    return gradient
