"""ZeRO 1 in bfloat16 (DeepSpeed's BF16_Optimizer): gradients in 16 bit whole, and a flat float32 copy of them all that
adds up micro-batches and stays between steps. Master weights and states are partitioned.

Reads the flat groups of `zero`; source: deepspeed/runtime/bf16_optimizer.py.
"""

from __future__ import annotations

from trainer.axes import SHARD
from trainer.estimate.layouts.common import WIDTHS, Setting, flat, place_batch, place_states, update_temporaries
from trainer.estimate.layouts.zero import ALLREDUCE_ELEMENTS, flat_groups, place_frozen
from trainer.estimate.timeline import Handle


class Bfloat16ZeroStage1:
    """Fulfils `compose.Layout`."""

    def __init__(self, setting: Setting) -> None:
        plan, anatomy = setting.plan, setting.profile.anatomy
        self.setting, self.timeline = setting, setting.timeline
        self.ranks = plan.degree(SHARD)
        self.param, self.master = WIDTHS[plan.param_dtype], WIDTHS[plan.master_dtype]
        self.groups = flat_groups(anatomy, self.ranks)
        self.gradients: list[Handle | None] = []
        self.last = True

    def start(self) -> None:
        # While a group is flattened it exists twice; where that does not fit DeepSpeed goes through host memory.
        for elements in self.groups:
            self.timeline.allocate("parameters", elements * self.param)
        place_frozen(self.setting)
        for elements in self.groups:
            self.timeline.allocate("optimizer", elements // self.ranks * self.master)
            self.timeline.allocate("gradients", elements * self.master)
        self.timeline.allocate("parameters", self.setting.profile.anatomy.buffers_bytes)
        place_batch(self.setting)

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        self.last = last

    def before_forward(self, group: str) -> None: ...

    def after_forward(self, group: str) -> None: ...

    def before_backward(self, group: str) -> None:
        if group == "root":
            self._clear()

    def after_backward(self, group: str) -> None: ...

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        self.gradients.append(self.timeline.move(handle, "gradients"))

    def end_backward(self) -> None:
        if self.last and self.groups[0] <= ALLREDUCE_ELEMENTS and len(self.groups) > 1:
            # A large flat group is reduced in place, small ones as one copy.
            self.timeline.free(self.timeline.allocate("buffers", sum(self.groups) * self.master))

    def update(self, step: int) -> None:
        shares = [flat(elements // self.ranks) for elements in self.groups]
        if step == 1:
            place_states(self.setting, shares)
        update_temporaries(self.setting, shares[:1])
        self._clear()

    def _clear(self) -> None:
        for handle in self.gradients:
            self.timeline.free(handle)
        self.gradients.clear()
