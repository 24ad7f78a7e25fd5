"""ZeRO 1 and 2 (DeepSpeed), computing in 16 bit: whole parameters, partitioned master weights and states.

    stage 1 (bfloat16)   gradients in 16 bit whole, and a flat float32 copy of them all that adds up micro-batches
    stage 2              gradients pass through a bucket and are cast to reduce_dtype; a rank keeps a W-th, in float32

Matrices and vectors are flattened apart (weight decay), each padded to a multiple of two elements per rank.
Reads `trainer.engine.deepspeed_config`; source: deepspeed/runtime/zero/stage_1_and_2.py and bf16_optimizer.py.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from configs.schema import DType, OffloadDevice
from trainer.engine.deepspeed_config import ModelSize
from trainer.memory.layouts.common import WIDTHS, Setting, place_batch, place_states, update_temporaries
from trainer.memory.profile import Anatomy
from trainer.memory.timeline import Handle

ALIGNMENT = 2  # elements per rank, to which a flat group is padded
ALLREDUCE_ELEMENTS = 500_000_000  # stage 1: flat groups are copied together until they have this many
NORM_BYTES = 8  # the norm is computed in float64


def model_size(anatomy: Anatomy) -> ModelSize:
    """What DeepSpeed's settings are computed from. The number of parameters per module matters for NVMe alone."""
    parameters = list(anatomy.parameters())
    return ModelSize(
        parameters=anatomy.numel,
        largest=max(p.numel for p in parameters),
        largest_vector=max((p.numel for p in parameters if len(p.shape) < 2), default=0),
        widest_module=2,
    )


class ZeroStage12:
    """Fulfils `compose.Layout`. settings: DeepSpeed's, as the engine gets them."""

    def __init__(self, setting: Setting, settings: dict[str, Any]) -> None:
        plan, anatomy = setting.plan, setting.profile.anatomy
        self.setting, self.timeline = setting, setting.timeline
        self.stage = plan.zero_stage
        self.ranks = plan.degree("dp_shard")
        self.bucket_elements = settings["zero_optimization"]["reduce_bucket_size"]
        self.param, self.reduce, self.master = (
            WIDTHS[dtype] for dtype in (plan.param_dtype, plan.reduce_dtype, plan.master_dtype)
        )
        self.offloaded = plan.offload_optimizer is not OffloadDevice.none
        parameters = list(anatomy.parameters())
        flat = [sum(p.numel for p in parameters if (len(p.shape) > 1) is matrix) for matrix in (True, False)]
        align = ALIGNMENT * self.ranks
        self.groups = [ceil(numel / align) * align for numel in flat if numel]
        self.largest = max(p.numel for p in parameters)
        self.numel = {(group, p.name): p.numel for group, members in anatomy.all_groups() for p in members}
        self.kept: list[Handle | None] = []
        self.bucket: Handle | None = None
        self.filled = 0
        self.partition: list[Handle | None] = []
        self.last = True

    def start(self) -> None:
        # While a group is flattened it exists twice; where that does not fit DeepSpeed goes through host memory.
        for elements in self.groups:
            self.timeline.allocate("parameters", elements * self.param)
        for elements in self.groups:
            self._place("optimizer", elements // self.ranks * self.master)
            if self.stage == 1:
                self.timeline.allocate("gradients", elements * self.master)
        if self.offloaded:
            self._place("gradients", sum(self.groups) // self.ranks * self.master)
            self._place("buffers", sum(self.groups) // self.ranks * self.param + self.largest * self.param)
            self.timeline.allocate("buffers", self.largest * self.param)
        self.timeline.allocate("parameters", self.setting.profile.anatomy.buffers_bytes)
        place_batch(self.setting)

    def _place(self, what: str, size: int) -> None:
        if self.offloaded and self.setting.gpu:
            self.setting.host[what] = self.setting.host.get(what, 0) + size
        else:
            self.timeline.allocate(what, size)

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        self.last = last

    def before_forward(self, group: str) -> None: ...

    def after_forward(self, group: str) -> None: ...

    def before_backward(self, group: str) -> None:
        if group == "root":
            self._clear()

    def after_backward(self, group: str) -> None: ...

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        if self.stage == 1:
            self.kept.append(self.timeline.move(handle, "gradients"))
            return
        elements = self.numel[group, parameter]
        if self.bucket is None:
            self.bucket = self.timeline.allocate("buffers", self.bucket_elements * self.param)
        if self.filled + elements > self.bucket_elements:
            self._reduce()
        self.filled += elements
        if elements > self.bucket_elements:
            self.kept.append(handle)
        else:
            self.timeline.free(handle)

    def end_backward(self) -> None:
        if self.stage == 2:
            self._reduce()
            self.timeline.free(self.bucket)
            self.bucket = None
        elif self.last and self.groups[0] <= ALLREDUCE_ELEMENTS and len(self.groups) > 1:
            # A large flat group is reduced in place, small ones as one copy.
            self.timeline.free(self.timeline.allocate("buffers", sum(self.groups) * self.master))

    def update(self, step: int) -> None:
        shares = [elements // self.ranks * self.master for elements in self.groups]
        if self.stage == 2 and not self.offloaded:
            most = min(self.largest, self.groups[0] // self.ranks)
            self.timeline.free(self.timeline.allocate("workspace", most * NORM_BYTES))
        if self.offloaded and self.setting.gpu:
            self.setting.host["optimizer states"] = int(sum(shares) * self.setting.profile.update.state)
        else:
            if step == 1:
                place_states(self.setting, shares)
            update_temporaries(self.setting, shares[:1])
        self._clear()
        for handle in self.partition:
            self.timeline.free(handle)
        self.partition.clear()

    def _reduce(self) -> None:
        """What is in the bucket: copied together, cast to reduce_dtype, added to this rank's partition."""
        if not self.filled:
            return
        if not self.partition:
            # On the GPU also where the optimizer is not: from there it is copied to the host.
            self.partition = [
                self.timeline.allocate("gradients", elements // self.ranks * self.master) for elements in self.groups
            ]
        copy = self.timeline.allocate("buffers", self.filled * self.param)
        cast = None
        if self.reduce != self.param:
            cast = self.timeline.allocate("buffers", self.filled * self.reduce)
        for handle in (cast, copy):
            self.timeline.free(handle)
        self._clear()
        self.filled = 0

    def _clear(self) -> None:
        for handle in self.kept:
            self.timeline.free(handle)
        self.kept.clear()


def supported(plan_dtype: DType, stage: int, *, offloaded: bool) -> bool:
    """The combinations whose account has been compared with real runs."""
    if stage == 3:
        return True
    return plan_dtype is DType.bfloat16 and not offloaded if stage == 1 else plan_dtype is not DType.float32
