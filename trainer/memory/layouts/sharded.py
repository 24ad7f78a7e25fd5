"""Fully sharded (FSDP2, also with replicas): what is gathered when, and where gradients pass through.

    gather    shard cast to param_dtype -> all-gather output -> a whole copy of each parameter; the output of the last
              gathering of a forward stays until the next one (their copies may overlap)
    backward  each group, as it begins, starts the gathering of the next one
    reduce    whole gradients -> reduce-scatter input in reduce_dtype -> 1/W of it in master_dtype; the input stays
              until the next group's reduction

Gathering and reducing run in streams of their own, whose memory the computation cannot reuse. A rank holds
ceil(rows / W) rows of each parameter: the first ranks' share, which none exceeds.
Reads `trainer.parallel.fsdp`'s groups; source: torch/distributed/fsdp/_fully_shard.
"""

from __future__ import annotations

from math import ceil, prod

from configs.schema import OffloadDevice
from trainer.memory.layouts.common import WIDTHS, Setting, place_batch, place_states, update_temporaries
from trainer.memory.profile import Parameter
from trainer.memory.timeline import COMPUTE, GATHER, REDUCE, Handle


class FullySharded:
    """Fulfils `compose.Layout`."""

    def __init__(self, setting: Setting) -> None:
        plan, anatomy = setting.plan, setting.profile.anatomy
        self.setting, self.timeline, self.reshard = setting, setting.timeline, plan.reshard_after_forward
        self.ranks = plan.degree("dp_shard") * plan.degree("cp")
        self.replicated = plan.degree("dp_replicate") > 1
        self.offloaded = plan.offload_parameters is not OffloadDevice.none
        self.master, self.param, self.reduce = (
            WIDTHS[dtype] for dtype in (plan.master_dtype, plan.param_dtype, plan.reduce_dtype)
        )
        # Groups without parameters of their own gather nothing.
        self.groups = {name: parameters for name, parameters in anatomy.all_groups() if parameters}
        self.shards = {name: [self._shard(p) for p in parameters] for name, parameters in self.groups.items()}
        self.whole: dict[str, list[Handle | None]] = {}
        self.pending: dict[str, Handle | None] = {}
        self.deferred: Handle | None = None
        self.order: list[str] = []
        self.received: dict[str, list[Handle | None]] = {}
        self.reducing: Handle | None = None
        self.sharded: dict[str, Handle | None] = {}
        self.partial: dict[str, Handle | None] = {}
        self.held: list[Handle | None] = []
        self.last = True

    def _shard(self, parameter: Parameter) -> int:
        """Elements of a rank's part, padding included."""
        shape = parameter.shape or (1,)
        return ceil(shape[0] / self.ranks) * prod(shape[1:])

    def start(self) -> None:
        for shards in self.shards.values():
            for shard in shards:
                self._place("parameters", shard * self.master)
        self.timeline.allocate("parameters", self.setting.profile.anatomy.buffers_bytes)
        place_batch(self.setting)

    def _place(self, what: str, size: int) -> None:
        if self.offloaded and self.setting.gpu:
            self.setting.host[what] = self.setting.host.get(what, 0) + size
        else:
            self.timeline.allocate(what, size)

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        self.last = last
        self.order = []

    def before_forward(self, group: str) -> None:
        if group not in self.groups:
            return
        fresh = group not in self.whole
        self._gather(group)
        # Only the next gathering of this forward frees the output of the last one.
        if fresh:
            self.timeline.free(self.deferred)
            self.deferred = None
            self._copy_out(group)
            self.deferred = self.pending.pop(group, None)

    def after_forward(self, group: str) -> None:
        if group in self.groups:
            if self.reshard:
                self._drop(group)
            self.order.append(group)
        if group == "root":
            self.timeline.free(self.deferred)
            self.deferred = None

    def before_backward(self, group: str) -> None:
        if group not in self.groups:
            return
        if group not in self.whole:
            self._gather(group)
            self._copy_out(group)
            self.timeline.free(self.pending.pop(group, None))
        place = self.order.index(group)
        if place > 0:
            self._gather(self.order[place - 1])

    def after_backward(self, group: str) -> None:
        if group not in self.groups:
            return
        gradients = self.received.pop(group, [])
        self._drop(group)
        self.timeline.free(self.reducing)
        shard = sum(self.shards[group])
        self.reducing = self.timeline.allocate("buffers", shard * self.ranks * self.reduce)
        for handle in gradients:
            self.timeline.free(handle)
        self._keep(group, shard)

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        self.received.setdefault(group, []).append(handle)

    def end_backward(self) -> None:
        for group in ("root", "embedding"):
            self.after_backward(group)
        for handle in (self.reducing, *self.held):
            self.timeline.free(handle)
        self.reducing = None
        self.held.clear()

    def update(self, step: int) -> None:
        sizes = [shard * self.master for shards in self.shards.values() for shard in shards]
        if self.offloaded and self.setting.gpu:
            state = self.setting.profile.update.state
            self.setting.host["optimizer"] = int(sum(sizes) * state)
            self.setting.host["gradients"] = sum(sizes)
        else:
            if step == 1:
                place_states(self.setting, sizes)
            matrices = [p for parameters in self.groups.values() for p in parameters if len(p.shape) > 1]
            update_temporaries(self.setting, [self._shard(p) * self.master for p in matrices])
        for handle in self.sharded.values():
            self.timeline.free(handle)
        self.sharded.clear()

    def _gather(self, group: str) -> None:
        """Start the all-gather: its output is one flat tensor."""
        if group in self.whole or group in self.pending or self.ranks == 1:
            return
        shard = sum(self.shards[group]) * self.param
        cast = None
        if self.param != self.master or (self.offloaded and self.setting.gpu):
            cast = self.timeline.allocate("buffers", shard, GATHER)
        self.pending[group] = self.timeline.allocate("buffers", shard * self.ranks, GATHER)
        self.timeline.free(cast)

    def _copy_out(self, group: str) -> None:
        """Whole parameters, each in a tensor of its own."""
        self.whole[group] = [
            self.timeline.allocate("buffers", shard * self.ranks * self.param, COMPUTE) for shard in self.shards[group]
        ]

    def _drop(self, group: str) -> None:
        for handle in self.whole.pop(group, []):
            self.timeline.free(handle)

    def _keep(self, group: str, shard: int) -> None:
        """This rank's part of the reduced gradient: kept, or added to what is kept."""
        reduced = self.timeline.allocate("gradients", shard * self.reduce, REDUCE)
        if self.replicated and not self.last:
            if group in self.partial:
                self.timeline.free(reduced)
            else:
                self.partial[group] = reduced
            return
        self.timeline.free(self.partial.pop(group, None))
        if self.reduce != self.master:
            cast = self.timeline.allocate("gradients", shard * self.master, REDUCE)
            if self.replicated:
                self.held.append(reduced)
            else:
                self.timeline.free(reduced)
            reduced = cast
        if group in self.sharded or (self.offloaded and self.setting.gpu):
            self.timeline.free(reduced)
        else:
            self.sharded[group] = reduced
