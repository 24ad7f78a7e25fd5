"""The torch engine of MeZO (`trainer.update.mezo`): two forwards, and one number that is summed over all ranks.

forward_backward    + eps z, forward, - 2 eps z, forward, + eps z
step                w <- (1 - lr * decay) w - lr * slope * z
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from configs.schema import Config
from trainer.data import Batch
from trainer.engine.protocol import Counters, StepReport
from trainer.engine.saved import Saved
from trainer.engine.torch import TorchEngine
from trainer.optim.build import set_lr
from trainer.optim.mezo import Options
from trainer.optim.mezo.direction import Direction
from trainer.optim.options import read_options
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime


class Mezo(TorchEngine):
    """`StepReport.grad_norm` is the slope along the direction, without its sign."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        super().__init__(config, plan, runtime)
        assert isinstance(self.optimizer, Direction)
        self.direction, self.direction.seed = self.optimizer, config.train.seed
        self.epsilon, self.slope = read_options(config.optimizer, Options).epsilon, 0.0

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        self.direction.move(self.epsilon)
        above = self._sum(micro_batches) / valid_tokens
        self.direction.move(-2 * self.epsilon)
        below = self._sum(micro_batches) / valid_tokens
        self.direction.move(self.epsilon)
        both = torch.stack([above, below])
        dist.all_reduce(both)
        self.slope = ((both[0] - both[1]) / (2 * self.epsilon)).item()
        return (above + below) / 2

    def step(self, lr: float) -> StepReport:
        set_lr(self.optimizer, lr)
        finite = math.isfinite(self.slope)
        if finite:
            self.direction.slope = self.slope * self._clip_factor(abs(self.slope))
            self.direction.step()
        self.discard()
        return StepReport(grad_norm=abs(self.slope), updated=finite)

    def discard(self) -> None:
        # A skipped step has used its direction.
        self.direction.updates += 1

    def counters(self) -> Counters:
        return Counters(optimizer_steps=self.direction.updates)

    def load_state(self, saved: Saved, counters: Counters) -> None:
        super().load_state(saved, counters)
        self.direction.updates = counters.optimizer_steps

    def _sum(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """This rank's share of the sum over valid tokens, without dropout."""
        total = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for batch in micro_batches:
            total += self.evaluate(batch)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the next forward would use copies gathered before the weights moved
        return total
