"""The time of collectives on a cluster of nodes: bytes over the slowest wire that they must cross, plus latency.

    GPUs of a node     links among them (NVLink): `Gpu.link_bandwidth`
    nodes              each GPU has its share of the node's adapters: `cluster.network_gb_per_second`

A group of ranks that spans nodes gathers over both at once: within a node (p - 1) / p of the bytes over one GPU's
links, into each of n nodes (n - 1) / n of them over the adapters of its p members there. The slower counts, as in the
ring algorithms of NCCL. A reduce-scatter is a gather backwards; an all-reduce is both, one after the other
(Thakur et al. 2005; Patarasuk and Yuan 2009). Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from configs.schema import Config
from trainer.plan.devices import GB_PER_SECOND, NVLINK_BRIDGE, PCIE_4, Gpu
from trainer.plan.plan import Plan

ACHIEVED = 0.8
"""The part of a wire's data-sheet bandwidth that large messages get (NCCL's own tests reach 75 to 90 %)."""
HOP_SECONDS, NETWORK_HOP_SECONDS = 1e-6, 5e-6
ASSUMED_NETWORK_GB_PER_SECOND = 50.0


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Ranks that communicate. per_node: how many of them share a node."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return ceil(self.size / self.per_node)


def group_of(plan: Plan, *axes: str) -> RankGroup:
    """The ranks that differ along `axes`, neighbours in the view with these axes. Inner axes lie within a node
    first."""
    sizes = next((view.degrees for view in plan.views if axes[0] in view.degrees), plan.mesh)
    names = list(sizes)
    size = prod(sizes[axis] for axis in axes)
    stride = prod(sizes[name] for name in names[names.index(axes[-1]) + 1 :])
    return RankGroup(size=size, per_node=max(1, min(size, plan.gpus_per_node // stride)))


@dataclass(frozen=True, slots=True)
class Network:
    """Bytes per second that one GPU sends: link, to the GPUs of its node; network, to other nodes; host, to the
    node's memory."""

    link: float
    network: float
    host: float

    def gather(self, whole_bytes: float, group: RankGroup) -> float:
        """Seconds until every rank has `whole_bytes`, of which each had its part. Also a reduce-scatter."""
        if group.size == 1:
            return 0.0
        inside = whole_bytes * (group.per_node - 1) / group.per_node / self.link
        between = whole_bytes * (group.nodes - 1) / group.nodes / (self.network * group.per_node)
        return max(inside, between) + self._latency(group)

    def all_reduce(self, size_bytes: float, group: RankGroup) -> float:
        """Seconds until every rank of the group has the sum of what each had, `size_bytes`."""
        return 2 * self.gather(size_bytes, group)

    def all_to_all(self, size_bytes: float, group: RankGroup) -> float:
        """Seconds to deal out `size_bytes` of each rank to all of the group."""
        if group.size == 1:
            return 0.0
        inside = size_bytes * (group.per_node - 1) / group.size / self.link
        between = size_bytes * (group.size - group.per_node) / group.size / self.network
        return max(inside, between) + self._latency(group)

    def send(self, size_bytes: float, group: RankGroup) -> float:
        """Seconds to hand `size_bytes` to the next rank of the group, on another node if there is one."""
        if group.size == 1:
            return 0.0
        if group.nodes > 1:
            return size_bytes / self.network + NETWORK_HOP_SECONDS
        return size_bytes / self.link + HOP_SECONDS

    @staticmethod
    def _latency(group: RankGroup) -> float:
        return (group.per_node - 1) * HOP_SECONDS + (group.nodes - 1) * NETWORK_HOP_SECONDS


def build_network(config: Config, gpu: Gpu, gpus_per_node: int) -> Network:
    """The cluster's wires. A bridge joins two cards; more than two talk over PCIe."""
    both_ways = gpu.link_bandwidth
    if gpu.link == NVLINK_BRIDGE[0] and gpus_per_node > 2:
        both_ways = PCIE_4[1] * GB_PER_SECOND
    between = config.cluster.network_gb_per_second or ASSUMED_NETWORK_GB_PER_SECOND
    return Network(
        link=both_ways / 2 * ACHIEVED,
        network=between * GB_PER_SECOND * ACHIEVED,
        host=config.cluster.host_gb_per_second * GB_PER_SECOND,
    )
