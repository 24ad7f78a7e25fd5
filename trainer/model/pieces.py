"""A parameter and its pieces: from whole to local share and back, for any placement on the mesh.

The innermost axis, tensor parallel, divides first; FSDP2 then divides the rest. A share is therefore found by dividing
in that order and the whole by joining in the opposite one. DTensor's own `full_tensor` and `distribute_tensor` are
correct wherever each axis divides evenly or along another dimension; if both axes divide one dimension of a packed
matrix (GPT-2's fused query, key and value) they put the pieces in another order. Here each axis is handled separately,
which DTensor always does correctly.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def local_share(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This rank's share of `whole`, placed as `like`. No communication: every rank has the whole."""
    share = whole
    for name, placement in _cuts(like):
        share = distribute_tensor(share, like.device_mesh[name], [placement], src_data_rank=None).to_local()
    return share


def join(tensor: DTensor) -> torch.Tensor:
    """The whole tensor on every rank that holds a piece of it. A collective of these ranks."""
    shapes = [tensor.shape]
    for name, placement in _cuts(tensor):
        shapes.append(_shape_after(shapes[-1], placement, tensor, name))
    piece = tensor.to_local()
    for (name, placement), shape in reversed(list(zip(_cuts(tensor), shapes[:-1], strict=True))):
        piece = _joined(piece, tensor.device_mesh[name], placement, shape)
    return piece


def _joined(piece: torch.Tensor, mesh: DeviceMesh, placement: Placement, shape: torch.Size) -> torch.Tensor:
    """The pieces of one axis. Of a packed matrix each rank holds an equal part of every block: DTensor joins them rank
    by rank, since torch 2.11 cannot join them block by block."""
    stride = torch.empty(shape, device="meta").stride()
    packed = isinstance(placement, _StridedShard)
    alone = Shard(placement.dim) if packed else placement
    whole = DTensor.from_local(piece, mesh, [alone], shape=shape, stride=stride).full_tensor()
    if not packed:
        return whole
    blocks = torch.arange(shape[placement.dim], device=whole.device).chunk(int(placement.split_factor))
    order = torch.cat([block.chunk(mesh.size())[rank] for rank in range(mesh.size()) for block in blocks])
    return whole.index_select(placement.dim, order.argsort())


def held(tensor: DTensor, dim: int) -> list[int]:
    """The indices along one dimension of the whole that this rank holds, in its local order."""
    places = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
    for name, placement in _cuts(tensor):
        if getattr(placement, "dim", None) == dim:
            strided = isinstance(placement, _StridedShard)
            alone = _StridedShard(0, split_factor=placement.split_factor) if strided else Shard(0)
            places = distribute_tensor(places, tensor.device_mesh[name], [alone], src_data_rank=None).to_local()
    return places.tolist()


def _cuts(tensor: DTensor) -> list[tuple[str, Placement]]:
    """The axes that divide this tensor, in the order of division, each with its own placement on the remaining part."""
    names = tensor.device_mesh.mesh_dim_names or ()
    cuts: list[tuple[str, Placement]] = [
        (name, placement)
        for name, placement in zip(reversed(names), reversed(tensor.placements), strict=True)
        if not placement.is_replicate()
    ]
    # If tensor parallel divides the same dimension, FSDP2 writes its plain division as a strided one.
    return [*cuts[:1], *((name, Shard(getattr(placement, "dim", 0))) for name, placement in cuts[1:])]


def _shape_after(shape: torch.Size, placement: Placement, tensor: DTensor, name: str) -> torch.Size:
    """Shape of this rank's share of a tensor of `shape` that one axis divides."""
    empty = torch.empty(shape, device="meta")
    return distribute_tensor(empty, tensor.device_mesh[name], [placement], src_data_rank=None).to_local().shape
