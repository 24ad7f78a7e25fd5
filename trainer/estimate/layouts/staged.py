"""Stages of a pipeline, each sharded by FSDP2 for itself: gathered once per step, reduced once at its end.

    step      each group is gathered at its first use, or before the first forward where a rank has several stages
              (torch's engine fetches whole stages), and kept
    backward  whole gradients add up in reduce_dtype
    reduce    after the last backward: group by group, parameters dropped, gradients reduce-scattered

Torch's engine drops stages beyond three per rank between their uses; here they count as kept.
"""

from __future__ import annotations

from trainer.estimate.layouts.common import Setting
from trainer.estimate.layouts.sharded import FullySharded


class Staged(FullySharded):
    """ahead: gathered before the first forward. exchanged: the two ends of the pipeline
    are different ranks."""

    staged = True

    def __init__(self, setting: Setting, *, ahead: bool, exchanged: bool) -> None:
        super().__init__(setting)
        self.ahead, self.exchanged = ahead, exchanged
        self.reshard = False

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        super().begin_micro_batch(step, first=first, last=last)
        if self.ahead:
            for group in self.groups:
                self._gather(group)
            for group in self.groups:
                self._copy_out(group)
                self.timeline.free(self.pending.pop(group, None))

    def after_forward(self, group: str) -> None:
        super().after_forward(group)
        self.order.clear()

    def reduce_all(self) -> None:
        self.last = True
        for group in self.groups:
            self._reduce(group)
        self._finish()
        if self.exchanged:
            # The other end's gradient of a tied embedding.
            for parameter in self.anatomy.parameters():
                if parameter.summed == "ends" and parameter.trainable:
                    other = self.timeline.allocate("workspace", self._shard(parameter) * self.master)
                    self.timeline.free(other)
