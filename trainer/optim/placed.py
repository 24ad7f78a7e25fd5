"""Parameters that are divided over ranks: views of the pieces, states with the parameter's placement, and small tensors
that the ranks reduce together.

    parameter  [rows, columns]     cut along rows | columns     as the parameter is placed
    a state    [rows, 1]           cut along rows               the axis that cuts columns keeps a copy on each rank
    a state    [1, columns]        cut along columns            the axis that cuts rows keeps a copy on each rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from trainer.optim import managed
from trainer.optim.protocol import Average


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's piece of the gradient, placed as the parameter."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def zeros(parameter: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, *, paged: bool = False) -> torch.Tensor:
    """A state of this (undivided) shape. It is divided along the dimensions that it shares with the parameter. paged:
    in memory that its GPU and the host share."""
    if not isinstance(parameter, DTensor):
        return _zeros(tuple(shape), dtype, parameter.device, paged=paged)
    common = [len(shape) == parameter.ndim and length == parameter.shape[dim] for dim, length in enumerate(shape)]
    piece = parameter.to_local()
    here = [piece.shape[dim] if common[dim] else length for dim, length in enumerate(shape)]
    placements: list[Placement] = [
        placement if (dim := _dim(placement)) is not None and common[dim] else Replicate()
        for placement in parameter.placements
    ]
    return as_piece(_zeros(here, dtype, piece.device, paged=paged), parameter, placements, shape)


def as_piece(piece: torch.Tensor, like: DTensor, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """This rank's piece of a tensor of this shape. `DTensor.from_local` would move a piece in host memory, such as an
    offloaded parameter's, to the mesh's device."""
    stride = torch.empty(tuple(shape), device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, piece.dtype)
    spec = DTensorSpec(like.device_mesh, tuple(placements), tensor_meta=meta)
    return DTensor(piece, spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def sharding_groups(parameter: torch.Tensor, dims: Sequence[int]) -> list[Any]:
    """The process groups of the mesh axes that divide one of these dimensions of the parameter."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    chosen = {dim % parameter.ndim for dim in dims}
    axes = [axis for axis, placement in enumerate(parameter.placements) if _dim(placement) in chosen]
    return [mesh.get_group(axis) for axis in axes if mesh.size(axis) > 1]


def reduce_together(parts: Sequence[tuple[torch.Tensor, Sequence[int], torch.Tensor]], op: Any) -> None:
    """Reduce many small tensors in place, with one collective for each mesh axis.

    parts: a parameter, dimensions of it, and a tensor that each rank has computed from its piece of these dimensions.
    """
    by_group: dict[tuple[Any, torch.dtype], list[tuple[torch.Tensor, str]]] = {}
    for parameter, dims, tensor in parts:
        for group in sharding_groups(parameter, dims):
            device = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else tensor.device.type
            by_group.setdefault((group, tensor.dtype), []).append((tensor, device))
    for (group, _), members in by_group.items():
        # Offloaded parameters are in host memory, which the GPUs' collectives cannot reach.
        buffer = torch.cat([tensor.flatten() for tensor, _ in members]).to(members[0][1])
        dist.all_reduce(buffer, op=op, group=group)
        begin = 0
        for tensor, _ in members:
            tensor.copy_(buffer[begin : begin + tensor.numel()].view(tensor.shape))
            begin += tensor.numel()
        del buffer


@contextmanager
def averaged(optimizer: torch.optim.Optimizer, average: Average | None) -> Iterator[None]:
    """While it is open, parameters hold the weights to evaluate. Afterwards they have the same bits as before."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    states = optimizer.state.items() if average is not None else ()
    for parameter, state in states:
        if average is not None and average.kind in state:
            weight = local(parameter.detach())
            # Gradients that stay between steps (DDP's buckets) are zero, and provide the memory.
            room = local(parameter.grad) if parameter.grad is not None else torch.empty_like(weight)
            kept.append((weight, room.copy_(weight)))
            weight.lerp_(local(state[average.kind]), average.part)
    try:
        yield
    finally:
        for weight, room in kept:
            weight.copy_(room)
            room.zero_()


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, paged: bool) -> torch.Tensor:
    return managed.zeros(shape, dtype, device) if paged else torch.zeros(shape, dtype=dtype, device=device)


def _dim(placement: Placement) -> int | None:
    return getattr(placement, "dim", None)
