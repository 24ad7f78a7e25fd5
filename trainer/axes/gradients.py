"""The gradient of the whole model, wherever its pieces are: its global norm, and scaling in place.

A gradient is a plain tensor (the same on every rank that holds it) or a DTensor, of which this rank holds a piece.
Pieces are taken without autograd; autograd would record each of them.
The norm counts each element once: squares of the local pieces, summed over exactly those mesh axes that split the
tensor, and at last over the pipeline's stages, which hold different parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.axes import PIPELINE


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a DTensor; a plain tensor as it is. Shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class GlobalNorm:
    """L2 norm over all gradients of all ranks, which may come one after the other.

    Squares are added up in float64, so that the norm does not depend on how many pieces there are.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._norms: dict[frozenset[str], list[torch.Tensor]] = defaultdict(list)

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        pieces: dict[frozenset[str], list[torch.Tensor]] = defaultdict(list)
        for gradient in gradients:
            axes = _splitting_axes(gradient, self._groups)
            if (piece := local(gradient)).numel():
                pieces[axes].append(piece)
        for axes, tensors in pieces.items():
            self._norms[axes] += _norms(tensors)

    def total(self) -> float:
        """A collective: one number is all-reduced per axis that splits anything."""
        names = sorted(self._groups)
        # There is one sum for every combination of axes, also for those of which this rank has no piece: each
        # all-reduce must have the same shape on all its ranks.
        sums = torch.zeros([2] * len(names), dtype=torch.float64, device=self._device)
        for axes, norms in self._norms.items():
            index = tuple(int(name in axes) for name in names)
            sums[index] = torch.stack(norms).to(self._device).square().sum()
        for dim, name in enumerate(names):
            split = sums.select(dim, 1).contiguous()
            dist.all_reduce(split, group=self._groups[name])
            sums.select(dim, 1).copy_(split)
        total = sums.sum()
        if self._mesh[PIPELINE].size() > 1:
            dist.all_reduce(total, group=self._mesh.get_group(PIPELINE))
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


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    if tensors[0].is_cuda:
        # One kernel for all of them; the CPU has no such kernel.
        return list(torch._foreach_norm(tensors, dtype=torch.float64))  # pyright: ignore[reportPrivateImportUsage]
    return [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]


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
