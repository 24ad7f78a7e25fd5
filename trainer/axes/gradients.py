"""The gradient of the whole model, wherever its pieces are: its global norm, and scaling in place.

A gradient is a plain tensor (the same on every rank that holds it) or a DTensor, of which this rank holds a piece.
Pieces are taken without autograd; autograd would record each of them.
The norm counts each element once: squares of the local pieces, summed over exactly those mesh axes that split the
tensor, and at last over the pipeline's stages, which hold different parameters.
On the CPU, squares of float32 are added up in float32 along ROW elements, and from there on in float64: torch reduces a
float32 tensor to a float64 number without vector instructions, which takes up to 24 times as long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.axes import PIPELINE

ROW = 1024


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is. Shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class GlobalNorm:
    """L2 norm over all gradients of all ranks, which may come one after the other.

    Squares of pieces are added up in float64, so that the norm does not depend on how many there are.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._squares: dict[frozenset[str], list[torch.Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        pieces: dict[frozenset[str], list[torch.Tensor]] = defaultdict(list)
        for gradient in gradients:
            axes = _splitting_axes(gradient, self._groups)
            if (piece := local(gradient)).numel():
                pieces[axes].append(piece)
        for axes, tensors in pieces.items():
            self._squares[axes].append(_squares(tensors))

    def total(self) -> float:
        """A collective: one number is all-reduced per axis that splits anything."""
        names = sorted(self._groups)
        # There is one sum for every combination of axes, also for those of which this rank has no piece: each
        # all-reduce must have the same shape on all its ranks.
        sums = torch.zeros([2] * len(names), dtype=torch.float64, device=self._device)
        for axes, squares in self._squares.items():
            index = tuple(int(name in axes) for name in names)
            sums[index] = torch.stack(squares).to(self._device).sum()
        for dim, name in enumerate(names):
            split = sums.select(dim, 1).contiguous()
            dist.all_reduce(split, group=self._groups[name])
            sums.select(dim, 1).copy_(split)
        total = sums.sum()
        if (stages := self._mesh.get_group(PIPELINE)).size() > 1:
            dist.all_reduce(total, group=stages)
        return total.sqrt().item()


def global_norm(gradients: Sequence[torch.Tensor], *, mesh: DeviceMesh, device: torch.device) -> float:
    """The `GlobalNorm` of gradients that are all complete. A collective."""
    norm = GlobalNorm(mesh, device)
    norm.add(gradients)
    return norm.total()


def clamp(gradients: Sequence[torch.Tensor], largest: float) -> None:
    """Limit every element in place to -largest ... largest; 0: no limit."""
    if largest and (pieces := _pieces(gradients)):
        torch._foreach_clamp_min_(pieces, -largest)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_clamp_max_(pieces, largest)  # pyright: ignore[reportPrivateImportUsage]


def scale(gradients: Sequence[torch.Tensor], factor: float) -> None:
    """Multiply every gradient in place."""
    if factor != 1.0 and (pieces := _pieces(gradients)):
        torch._foreach_mul_(pieces, factor)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def _pieces(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [piece for gradient in gradients if (piece := local(gradient)).numel()]


def _squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the squares, a float64 scalar."""
    if tensors[0].is_cuda:
        # One kernel for all of them; the CPU has no such kernel.
        norms = torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))  # pyright: ignore[reportPrivateImportUsage]
        return norms.square().sum()
    norms = torch.cat([norm for tensor in tensors for norm in _norms(tensor)])
    if not norms.isfinite().all():  # perhaps squares alone are beyond float32
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    return norms.double().square().sum()


def _norms(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Norms of parts that together are the tensor, which is on the CPU."""
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous():
        return [torch.linalg.vector_norm(tensor, dtype=torch.float64)[None]]
    flat = tensor.view(-1)
    whole = len(flat) // ROW * ROW
    parts = (flat[:whole].view(-1, ROW), flat[None, whole:])
    return [torch.linalg.vector_norm(part, dim=1) for part in parts if part.numel()]


def _splitting_axes(gradient: torch.Tensor, groups: dict[str, dist.ProcessGroup]) -> frozenset[str]:
    """Names of the axes (of more than one rank) that split this tensor; adds their groups to `groups`."""
    if not isinstance(gradient, DTensor):
        return frozenset()
    mesh, axes = gradient.device_mesh, set()
    for dim, placement in enumerate(gradient.placements):
        assert not placement.is_partial(), "a gradient was not reduced before its norm was taken"
        if not placement.is_replicate() and mesh.size(dim) > 1:
            name = (mesh.mesh_dim_names or ())[dim]
            groups[name] = mesh.get_group(dim)
            axes.add(name)
    return frozenset(axes)
