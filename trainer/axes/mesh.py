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


def build_mesh(plan: Plan, device: torch.device) -> DeviceMesh:
    """The plan's mesh over all ranks. A collective: creates one process group per axis."""
    names, sizes = zip(*plan.mesh, strict=True)
    return init_device_mesh(device.type, sizes, mesh_dim_names=names)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP2 shards over: dp_shard, and cp with it, since ranks that split a sequence hold the same parameters.

    One axis, or two (replicate, shard) where there are replicas.
    """
    shard = "dp_shard"
    if mesh["cp"].size() > 1:
        mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        shard = "dp_shard_cp"
    return mesh["dp_replicate", shard] if mesh["dp_replicate"].size() > 1 else mesh[shard]
