"""The ranks as a grid with named axes: pp, dp_replicate, dp_shard, cp, tp, outer to inner.

    8 ranks, dp_shard 4 x tp 2:          tp 0   tp 1
                              dp_shard 0    0      1
                              dp_shard 1    2      3       tp groups: rows, neighbours on one node
                              dp_shard 2    4      5       dp_shard groups: columns
                              dp_shard 3    6      7

Every axis is always there; one of size 1 costs nothing and spares each reader a special case.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.plan.plan import Plan
from trainer.plan.views import View


def build_mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    """The plan's mesh over all ranks. A collective: creates one process group per axis."""
    degrees = plan.mesh
    return init_device_mesh(device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))


def fsdp_mesh(mesh: DeviceMesh, view: View) -> DeviceMesh:
    """What FSDP2 shards a parameter of this view over: dp_shard, and cp with it, since ranks that split a sequence hold
    the same parameters.

    One axis, or two (replicate, shard) where there are replicas.
    """
    axes = view.sharding
    name = "_".join(axes)
    if len(axes) > 1:
        mesh[axes]._flatten(name)
    return mesh[(*view.copying, name)] if view.copying else mesh[name]
