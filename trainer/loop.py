"""The training loop. It names no layout: what is split over what is the engine's business.

    join the process group -> run folder -> data -> engine -> steps -> validation -> export -> summary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.data import Batch, DataSet
from trainer.engine import Engine, StepReport
from trainer.runtime import Runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """loss: mean cross-entropy over the step's valid tokens, over all ranks. report: None if the loss was not finite
    and the step therefore dropped."""

    loss: float
    valid_tokens: int
    report: StepReport | None

    @property
    def finite(self) -> bool:
        return self.report is not None and math.isfinite(self.report.grad_norm)


def train_step(engine: Engine, batches: Sequence[Batch], runtime: Runtime, lr: float) -> StepResult:
    """One optimizer update. batches: this rank's micro-batches, on the CPU. A collective.

    The valid tokens of the whole step are counted before the first forward: every micro-batch is divided by the same
    number, so that each token weighs the same in every layout.
    """
    local_tokens = sum(batch.valid_tokens() for batch in batches)
    valid_tokens = torch.tensor(local_tokens, dtype=torch.float64, device=runtime.device)
    dist.all_reduce(valid_tokens)
    # A step without a single valid token has loss 0, not 0 / 0.
    valid_tokens.clamp_(min=1)
    loss = engine.forward_backward([batch.to(runtime.device) for batch in batches], valid_tokens).double()
    dist.all_reduce(loss)
    value = loss.item()
    report: StepReport | None = None
    if math.isfinite(value):
        report = engine.step(lr)
    else:
        engine.discard()
    return StepResult(loss=value, valid_tokens=int(valid_tokens.item()), report=report)


def validate(engine: Engine, data: DataSet, runtime: Runtime) -> float:
    """Mean cross-entropy per valid token over the validation samples, the same on all ranks. A collective."""
    total, tokens = 0.0, 0
    for batch in data.validation():
        total += engine.evaluate(batch.to(runtime.device)).item()
        tokens += batch.valid_tokens()
    total, all_tokens = runtime.sum(total, tokens)
    return total / max(1.0, all_tokens)
