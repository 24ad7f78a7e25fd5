"""ZeRO 1 in bfloat16 (DeepSpeed's BF16_Optimizer): whole gradients in 16 bit, and a flat float32 copy of all of them.

The copy adds up micro-batches and stays between steps. Master weights and states are partitioned.

Reads the flat groups of `zero`; source: deepspeed/runtime/bf16_optimizer.py.
"""

from __future__ import annotations

from trainer.estimate.layouts.common import Setting, flat
from trainer.estimate.layouts.zero import ALLREDUCE_ELEMENTS, Zero, flat_groups, place_flat
from trainer.estimate.timeline import Handle


class Bfloat16ZeroStage1(Zero):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.groups = flat_groups(self.anatomy, self.ranks)
        self.gradients: list[Handle | None] = []

    def start(self) -> None:
        place_flat(self, self.groups)
        for elements in self.groups:
            self.timeline.allocate("optimizer", elements // self.ranks * self.master)
            self.timeline.allocate("gradients", elements * self.master)
        super().start()

    def begin_backward(self) -> None:
        self.timeline.free_all(self.gradients)

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        self.gradients.append(self.timeline.move(handle, "gradients"))

    def end_backward(self) -> None:
        if self.last and self.groups[0] <= ALLREDUCE_ELEMENTS and len(self.groups) > 1:
            # A large flat group is reduced in place, small ones as one copy.
            self.timeline.free(self.timeline.allocate("buffers", sum(self.groups) * self.master))

    def update(self, step: int) -> None:
        shares = [flat(elements // self.ranks) for elements in self.groups]
        if step == 1:
            self.setting.place_states(shares)
        self.setting.update(shares[:1])
        self.timeline.free_all(self.gradients)
