"""The ranks as grids with named axes. The dense one: pp, dp_replicate, dp_shard, cp, tp, outer to inner.

    8 ranks, dp_shard 4 x tp 2:          tp 0   tp 1
                              dp_shard 0    0      1
                              dp_shard 1    2      3       tp groups: rows, neighbours on one node
                              dp_shard 2    4      5       dp_shard groups: columns
                              dp_shard 3    6      7

Every axis always exists; one of size 1 costs nothing and saves each reader a special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.plan.plan import Plan
from trainer.plan.views import DENSE, View


@dataclass(frozen=True, slots=True)
class Meshes:
    """The ranks in each view of the plan. views: by name, always including the dense one."""

    views: Mapping[str, DeviceMesh]

    @property
    def dense(self) -> DeviceMesh:
        return self.views[DENSE]

    def of(self, view: View) -> DeviceMesh:
        return self.views[view.name]


def build_meshes(plan: Plan, device: torch.device) -> Meshes:
    """Meshes of the same ranks. A collective: creates one process group per axis and view."""

    def build(degrees: dict[str, int]) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(degrees.values()), mesh_dim_names=tuple(degrees))

    return Meshes({view.name: build(view.degrees) for view in plan.views})


def fsdp_mesh(mesh: DeviceMesh, view: View) -> DeviceMesh:
    """The axis over which FSDP2 shards a parameter of this view. In the dense view dp_shard, combined with cp, since
    ranks that split a sequence hold the same parameters; in the expert view efsdp.

    One axis, or two (replicate, shard) if there are replicas.
    """
    axes = view.sharding
    name = "_".join(axes)
    if len(axes) > 1:
        mesh[axes]._flatten(name)
    return mesh[(*view.copying, name)] if view.copying else mesh[name]
