"""ZeRO 3 (DeepSpeed): parameters, gradients, master weights and states partitioned over W ranks.

    for good       param_dtype partition + gradients in grad_accum_dtype + master partition + states, each P / W;
                   one bucket of reduce_bucket_size elements in reduce_dtype; parameters below the persistence
                   threshold whole, from their first use on
    forward        a module's parameters are gathered before it and dropped after it, the next ones ahead of time;
                   those that the backward needs again within stage3_max_reuse_distance elements stay
    hpZ            zero_hpz_partition_size ranks keep a second copy of what the forward has dropped, until the update
    backward       gradients are copied into the bucket; when it is full, a second copy of it is reduce-scattered
    update         one sub-group of sub_group_size elements after another, each with its own float32 gradient
    NVMe           states, master weights and the update's gradients on disk; in host memory pinned buffers for the
                   largest sub-group; for parameters on disk buffers to read them into, and one to write a sub-group

Reads `trainer.engine.deepspeed.config`; source: deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil, inf
from typing import Any

from configs.choices import BYTES, OffloadDevice
from trainer.engine.deepspeed.config import DTYPE_NAMES
from trainer.estimate.layouts.common import Setting, flat
from trainer.estimate.layouts.zero import Bucketed, trained
from trainer.estimate.profile import Anatomy, Parameter
from trainer.estimate.timeline import GATHER, Handle

WIDTHS = {name: BYTES[dtype] for dtype, name in DTYPE_NAMES.items()}
NORM_BYTES = 8  # norms of an offloaded gradient are computed in float64


def sub_groups(anatomy: Anatomy, ranks: int, size: int) -> list[tuple[int, int]]:
    """(elements on a rank, elements on all ranks) of each sub-group: parameters in order, matrices before vectors, a
    sub-group is closed when it has reached its size."""
    groups: list[tuple[int, int]] = []
    for matrix in (True, False):
        share = whole = 0
        for parameter in trained(anatomy):
            if (len(parameter.shape) > 1) is matrix:
                share += ceil(parameter.numel / ranks)
                whole += parameter.numel
                if share >= size:
                    groups.append((share, whole))
                    share = whole = 0
        if share:
            groups.append((share, whole))
    return groups


class ZeroStage3(Bucketed):
    def __init__(self, setting: Setting, settings: dict[str, Any]) -> None:
        super().__init__(setting, settings)
        plan, zero = setting.plan, settings["zero_optimization"]
        # Of the partition in which gradients add up.
        self.added = WIDTHS[settings["data_types"]["grad_accum_dtype"]]
        self.optimizer, self.parameters = plan.offload_optimizer, plan.offload_parameters
        self.groups = dict(self.anatomy.all_groups())
        self.kept = self._kept_whole(zero)
        self.live = zero["stage3_max_live_parameters"]
        self.reuse = zero["stage3_max_reuse_distance"]
        self.ahead = zero["stage3_prefetch_bucket_size"]
        # Ranks that share a second copy of the parameters, if fewer than all keep the first.
        self.sharing = zero.get("zero_hpz_partition_size", 1)
        self.frozen = sum(ceil(p.numel / self.ranks) for p in self.anatomy.parameters() if not p.trainable)
        self.shards = [ceil(p.numel / self.ranks) for p in trained(self.anatomy)]
        self.sub_groups = sub_groups(self.anatomy, self.ranks, zero["sub_group_size"])
        self.swapped = zero.get("offload_param", {})
        self.swap_buffers = zero.get("offload_optimizer", {}).get("buffer_count", 0)
        self.after = self._elements_after()
        self.second: dict[str, list[Handle | None]] = {}
        self.whole: dict[str, list[Handle | None]] = {}
        self.persistent: set[str] = set()
        self.step = 0

    def _order(self) -> list[str]:
        """As the model names its parameters, and the forward passes them; the root (norm) stands before the head."""
        order = ["embedding", *(name for name in self.groups if name.isdigit()), "root", "head"]
        return [name for name in order if name in self.groups]

    def _kept_whole(self, zero: Mapping[str, Any]) -> set[tuple[str, str]]:
        """Small parameters, as many as there is room for."""
        room, kept = zero.get("stage3_model_persistence_threshold", inf), set[tuple[str, str]]()
        for group in self._order():
            for parameter in self.groups[group]:
                if parameter.numel <= min(room, zero["stage3_param_persistence_threshold"]):
                    room -= parameter.numel
                    kept.add((group, parameter.name))
        return kept

    def _elements_after(self) -> dict[str, int]:
        """Elements of all groups that the forward passes after each."""
        total, after = 0, {}
        for name in reversed(self._order()):
            after[name] = total
            total += sum(p.numel for p in self._large(name))
        return after

    def _large(self, group: str) -> list[Parameter]:
        return [p for p in self.groups.get(group, ()) if (group, p.name) not in self.kept]

    def start(self) -> None:
        elements = sum(self.shards)
        self.setting.place("parameters", (elements + self.frozen) * self.param, self.parameters)
        self.setting.place("gradients", elements * self.added, self._gradients())
        self.setting.place("optimizer", elements * self.master, self.optimizer)
        if self.optimizer is not OffloadDevice.none:
            # The gradient that the update on the CPU reads, in addition to the one that adds up micro-batches.
            self.setting.place("gradients of the update", elements * self.master, self.optimizer)
        if self.sharing > 1:
            for group, members in self.groups.items():
                self._keep_second(group, members)
        self._place_staging()
        self.timeline.allocate("buffers", self.bucket_elements * self.reduce)
        super().start()

    def _place_staging(self) -> None:
        """Pinned host memory between the GPU and the disk. Its allocation goes past torch."""
        if self.optimizer is OffloadDevice.nvme:
            largest = max(elements for elements, _ in self.sub_groups)
            self.setting.host["optimizer staging"] = self.swap_buffers * largest * self.master
        if self.parameters is OffloadDevice.nvme:
            reading = self.swapped["buffer_count"] * self.swapped["buffer_size"]
            # For writing, as many elements as the largest sub-group has on all ranks together.
            _, writing = max(self.sub_groups)
            self.setting.host["parameter staging"] = (reading + writing) * self.param

    def _gradients(self) -> OffloadDevice:
        """The gradient partition waits in host memory for an optimizer that is not on the GPU."""
        return OffloadDevice.none if self.optimizer is OffloadDevice.none else OffloadDevice.cpu

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        self.step = step

    def before_forward(self, group: str) -> None:
        self._gather(group)

    def after_forward(self, group: str) -> None:
        if 2 * self.after.get(group, 0) > self.reuse or self.step == 1:
            self._drop(group)

    def before_backward(self, group: str) -> None:
        self._gather(group)

    def after_backward(self, group: str) -> None:
        self._drop(group)

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        self.fill(self.numel[group, parameter], handle)

    def end_backward(self) -> None:
        self.empty()
        for group in list(self.whole):
            self._drop(group)

    def update(self, step: int) -> None:
        sizes = [elements * self.master for elements, _ in self.sub_groups]
        rows = [flat(elements) for elements, _ in self.sub_groups]
        on_disk = self.optimizer is OffloadDevice.nvme
        if self.optimizer is OffloadDevice.none or not (self.setting.gpu or on_disk):
            if step == 1:
                self.setting.place_states(rows)
            gradient = self.timeline.allocate("workspace", max(sizes))
            self.setting.update([max(rows, key=lambda row: row.piece.numel)])
            self.timeline.free(gradient)
        elif step == 1:
            self.setting.place("optimizer states", self.setting.states_bytes(rows), self.optimizer)

        # The next forward makes the second copies of the updated parameters, when it drops them.
        for group in list(self.second):
            self.timeline.free_all(self.second.pop(group))

    def _keep_second(self, group: str, members: Iterable[Parameter]) -> None:
        """hpZ: this rank's part of the copy that `sharing` ranks have of what is not gathered."""
        if self.sharing > 1 and group not in self.second:
            parts = (ceil(p.numel / self.sharing) * self.param for p in members)
            self.second[group] = [self.timeline.allocate("parameters", part) for part in parts]

    def _next(self, group: str) -> str:
        """The layer after a layer, which in either direction is as large; of other groups none."""
        return group if group.isdigit() and len(self.anatomy.layers) > 1 else ""

    def _gather(self, group: str) -> None:
        members = self.groups.get(group, ())
        if group in self.whole or not members:
            return
        if group not in self.persistent:
            for parameter in members:
                if (group, parameter.name) in self.kept:
                    self.timeline.allocate("parameters", parameter.numel * self.param, GATHER)
            self.persistent.add(group)
        large = self._large(group)
        # Modules are gathered one by one: at most the computing module and the prefetched ones are alive.
        # That may reach into the group that comes next.
        both = sum(p.numel for p in (*large, *self._large(self._next(group))))
        largest = max((p.numel for p in large), default=0)
        most = min(both, largest + min(self.ahead, max(0, self.live - largest)))
        self.whole[group] = [self.timeline.allocate("buffers", most * self.param, GATHER)]

    def _drop(self, group: str) -> None:
        if group in self.whole:
            self._keep_second(group, self._large(group))
        self.timeline.free_all(self.whole.pop(group, []))

    def reduce_bucket(self) -> None:
        copy = self.timeline.allocate("buffers", self.filled * self.reduce)
        if self._gradients() is not OffloadDevice.none:
            self.timeline.free(self.timeline.allocate("workspace", max(self.shards) * NORM_BYTES))
        self.timeline.free(copy)
