"""ZeRO 1 and 2 (DeepSpeed): whole parameters, partitioned master weights and states.

    stage 1    gradients whole in float32 until the last micro-batch, then through a bucket of float32
    stage 2    gradients of each micro-batch through a bucket in param_dtype; a rank keeps a W-th, in float32

What is in the bucket is copied together and cast to reduce_dtype to cross the ranks. Matrices and vectors are
flattened apart (weight decay), each padded to a multiple of two elements per rank.
Reads `trainer.engine.deepspeed.config`; source: deepspeed/runtime/zero/stage_1_and_2.py. Stage 1 in bfloat16 on the
GPU has an optimizer of its own: see `zero1`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from math import ceil
from typing import Any

from configs.choices import OffloadDevice
from trainer.axes import SHARD
from trainer.engine.deepspeed.config import ModelSize
from trainer.estimate.layouts.common import Layout, Setting, flat
from trainer.estimate.profile import Anatomy, Parameter
from trainer.estimate.timeline import Handle

ALIGNMENT = 2  # elements per rank, to which a flat group is padded
ALLREDUCE_ELEMENTS = 500_000_000  # gradients are copied together until they have this many
NORM_BYTES = 8  # the norm is computed in float64


def model_size(anatomy: Anatomy) -> ModelSize:
    """What DeepSpeed's settings are computed from. The number of parameters per module matters for NVMe alone."""
    parameters = list(anatomy.parameters())
    return ModelSize(
        parameters=anatomy.numel,
        trained=sum(p.numel for p in trained(anatomy)),
        largest=max(p.numel for p in parameters),
        largest_vector=max((p.numel for p in parameters if len(p.shape) < 2), default=0),
        widest_module=2,
    )


class Zero(Layout):
    """DeepSpeed's partitions over the data-parallel ranks."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.ranks = self.plan.degree(SHARD)


class Bucketed(Zero):
    """A bucket of fixed size into which gradients are copied, except those that are larger.

    settings: DeepSpeed's, as the engine gets them."""

    def __init__(self, setting: Setting, settings: dict[str, Any]) -> None:
        super().__init__(setting)
        self.bucket_elements = settings["zero_optimization"]["reduce_bucket_size"]
        self.contiguous = settings["zero_optimization"]["contiguous_gradients"]
        self.numel = {(group, p.name): p.numel for group, members in self.anatomy.all_groups() for p in members}
        self.filled = 0
        self.outside: list[Handle | None] = []

    def fill(self, elements: int, handle: Handle | None) -> None:
        if self.filled and self.filled + elements > self.bucket_elements:
            self.empty()
        self.filled += elements
        if elements > self.bucket_elements or not self.contiguous:
            self.outside.append(handle)
        else:
            self.timeline.free(handle)

    def empty(self) -> None:
        """Reduce the contents of the bucket."""
        if self.filled:
            self.reduce_bucket()
            self.timeline.free_all(self.outside)
            self.filled = 0

    @abstractmethod
    def reduce_bucket(self) -> None: ...


class ZeroStage12(Bucketed):
    """DeepSpeed's optimizer of stages 1 and 2 (but see `zero1` for stage 1 in bfloat16)."""

    def __init__(self, setting: Setting, settings: dict[str, Any]) -> None:
        super().__init__(setting, settings)
        plan, anatomy = self.plan, self.anatomy
        self.stage, zero = plan.zero_stage, settings["zero_optimization"]
        self.overlaps, self.scatters = zero["overlap_comm"], zero["reduce_scatter"]
        self.offloaded = plan.offload_optimizer is not OffloadDevice.none
        # Gradients in 16 bit add up in float32: in a partition of their own, under stage 1 also while they are whole.
        self.compact = self.param != self.master
        self.whole_width = self.master if self.stage == 1 else self.param
        self.groups = flat_groups(anatomy, self.ranks)
        self.largest = max(p.numel for p in trained(anatomy))
        self.touched = touched_elements(anatomy, self.groups, self.ranks)
        self.whole: dict[tuple[str, str], Handle | None] = {}
        self.bucket: Handle | None = None
        self.received: Handle | None = None
        self.partition: list[Handle | None] = []
        self.accumulators = False

    def start(self) -> None:
        place_flat(self, self.groups)
        share = sum(self.groups) // self.ranks
        self.setting.place("optimizer", share * self.master, self.plan.offload_optimizer)
        if self.offloaded:
            self.setting.place("gradients", share * self.master, self.plan.offload_optimizer)
            self.setting.place("buffers", share * self.param + self.largest * self.param, self.plan.offload_optimizer)
            self.timeline.allocate("buffers", self.largest * self.param)
        super().start()

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        key = group, parameter
        if self.bucket is None:
            # While one is reduced, the backward fills the other.
            buckets = self.contiguous + self.overlaps
            self.bucket = self.timeline.allocate("buffers", self.bucket_elements * self.whole_width * buckets)
        if self.stage == 1:
            self._accumulate(key, handle)
            if self.overlaps and self.last:
                self.fill(self.numel[key], self.whole.pop(key))
        else:
            self.fill(self.numel[key], handle)

    def end_backward(self) -> None:
        if self.stage == 1:
            if not self.last:
                return
            for key, handle in self.whole.items():
                self.fill(self.numel[key], handle)
            self.whole.clear()
        self.empty()
        if self.partition:
            self.timeline.free(self.received)
        elif self.received is not None:
            self.partition = [self.received]
        self.received = None
        # Gradients that stage 1 holds in float32 are views of the bucket until the update is done.
        if not (self.stage == 1 and self.compact):
            self._release_bucket()

    def update(self, step: int) -> None:
        shares = [flat(elements // self.ranks) for elements in self.groups]
        copy = None
        if not self.offloaded:
            most = min(self.largest, self.groups[0] // self.ranks)
            self.timeline.free(self.timeline.allocate("workspace", most * NORM_BYTES))
            if not self.compact:
                copy = self.timeline.allocate("gradients", shares[0].piece.numel * self.master)
        if self.offloaded and self.setting.gpu:
            self.setting.host["optimizer states"] = self.setting.states_bytes(shares)
        else:
            if step == 1:
                self.setting.place_states(shares)
            self.setting.update(shares[:1])
        self.timeline.free(copy)
        self.timeline.free_all(self.partition)
        self._release_bucket()

    def _accumulate(self, key: tuple[str, str], handle: Handle | None) -> None:
        """Stage 1: no gradient crosses the ranks before the last micro-batch."""
        if not self.compact:
            if key in self.whole:
                self.timeline.free(handle)
            else:
                self.whole[key] = self.timeline.move(handle, "gradients")
            return
        wide = self.timeline.allocate("gradients", self.numel[key] * self.master)
        self.timeline.free(handle)
        if key in self.whole:
            self.timeline.free(wide)
        else:
            self.whole[key] = wide

    def reduce_bucket(self) -> None:
        """Copy the contents of the bucket together and cast them to reduce_dtype; this rank's share is kept."""
        if self.compact and not self.partition:
            # It is on the GPU also where the optimizer is not: from there it is copied to the host.
            self.partition = [
                self.timeline.allocate("gradients", elements // self.ranks * self.master) for elements in self.groups
            ]
        elements = min(self.filled, ALLREDUCE_ELEMENTS + self.groups[0] // self.ranks)
        # An all-reduce of the whole bucket is done in place, where it is contiguous.
        copies = self.scatters or not self.contiguous
        copy = self.timeline.allocate("buffers", elements * self.whole_width if copies else 0)
        cast = None
        if self.reduce != self.whole_width:
            cast = self.timeline.allocate("buffers", elements * self.reduce)
        for handle in (cast, copy):
            self.timeline.free(handle)
        if not self.compact:
            self._keep()

    def _keep(self) -> None:
        """Without a partition of their own: gradients of this rank, parameters that it shares with others whole."""
        if not self.offloaded:
            if self.received is None:
                self.received = self.timeline.allocate("gradients", self.touched * self.param)
        elif self.stage == 2 and not self.accumulators and self.plan.batch.gradient_accumulation_steps > 1:
            self.setting.place("gradients of the update", self.touched * self.param, self.plan.offload_optimizer)
            self.accumulators = True

    def _release_bucket(self) -> None:
        self.timeline.free(self.bucket)
        self.bucket = None


def trained(anatomy: Anatomy) -> Iterator[Parameter]:
    """The parameters that are flattened, reduced and updated: all of them, or adapters alone."""
    return (parameter for parameter in anatomy.parameters() if parameter.trainable)


def place_flat(layout: Layout, groups: list[int]) -> None:
    """Parameters in their flat groups, and those that are only held: whole, each a tensor of its own."""
    # While a group is flattened it exists twice; where that does not fit DeepSpeed goes through host memory.
    for elements in groups:
        layout.timeline.allocate("parameters", elements * layout.param)
    for size in layout.anatomy.frozen_tensors(layout.param):
        layout.timeline.allocate("parameters", size)


def flat_groups(anatomy: Anatomy, ranks: int) -> list[int]:
    """Elements of the flat groups, padding included: matrices, then vectors."""
    align = ALIGNMENT * ranks
    flat = [sum(p.numel for p in trained(anatomy) if (len(p.shape) > 1) is matrix) for matrix in (True, False)]
    return [ceil(numel / align) * align for numel in flat if numel]


def touched_elements(anatomy: Anatomy, groups: list[int], ranks: int) -> int:
    """Elements of all parameters of which a rank's partition has a part, on the rank that has most."""
    touched: Counter[int] = Counter()
    for matrix, elements in zip((True, False), groups, strict=False):
        share, begin = elements // ranks, 0
        for parameter in trained(anatomy):
            if (len(parameter.shape) > 1) is matrix:
                end = begin + parameter.numel
                for rank in range(begin // share, (end - 1) // share + 1):
                    touched[rank] += parameter.numel
                begin = end
    return max(touched.values())
