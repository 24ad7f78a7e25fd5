"""One optimizer update and one validation, over all ranks, in terms of the engine alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch

from configs.choices import NonFinite
from configs.errors import TrainingFailed
from trainer.data import Batch, DataSet
from trainer.engine import Engine, StepReport, StepResult
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime
from trainer.process.watchdog import watched
from trainer.report.measure import StepTimer

log = logging.getLogger(__name__)


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    plan: Plan,
    runtime: Runtime,
    lr: float,
    timer: StepTimer | None = None,
) -> StepResult:
    """One optimizer update. batches: this rank's micro-batches, on the CPU. A collective.

    The valid tokens of the whole step are counted before the first forward. Every micro-batch is divided by this
    number, so each token has the same weight in every layout.
    """
    timer = timer or StepTimer(runtime.device)
    with timer.forward_backward():
        local_tokens = sum(batch.valid_tokens() for batch in batches)
        valid_tokens = torch.tensor(local_tokens / plan.same_data, dtype=torch.float64, device=runtime.device)
        runtime.add_up(valid_tokens)
        # Every rank of a pipeline or tensor-parallel group has counted the same sequences; their parts add up to one
        # count, except for the last bit if the group's size is not a power of two.
        valid_tokens.round_()
        # A step without a valid token has loss 0, not 0 / 0.
        valid_tokens.clamp_(min=1)
        loss = engine.forward_backward([batch.to(runtime.device) for batch in batches], valid_tokens).double()
        value = runtime.add_up(loss).item()
    report: StepReport | None = None
    with timer.optimizer():
        if math.isfinite(value):
            report = engine.step(lr)
        else:
            engine.discard()
    return StepResult(loss=value, valid_tokens=int(valid_tokens.item()), report=report)


def check_finite(result: StepResult, step: int, wanted: NonFinite) -> None:
    """Raise TrainingFailed if the step was skipped and the config says to stop. No parameter has changed."""
    if result.report is not None and (result.report.updated or result.overflowed):
        return
    grad_norm = result.report.grad_norm if result.report else math.nan
    problem = f"step {step}: loss {result.loss}, gradient norm {grad_norm}: not finite, the update was left out"
    if wanted is NonFinite.stop:
        raise TrainingFailed(
            f"{problem}; try a smaller optimizer.lr, more scheduler.warmup_steps or precision=bf16 instead of fp16,"
            " or go on with train.non_finite=skip"
        )
    log.warning(problem)


def check_validation(losses: Mapping[str, float], step: int, wanted: NonFinite) -> None:
    """Raise TrainingFailed if a validation loss is not finite and the config says to stop. The last update broke the
    parameters, and later training losses need not show it. Step 0 is before the first update."""
    broken = [f"{metric} {value}" for metric, value in losses.items() if not math.isfinite(value)]
    if not broken:
        return
    problem = f"step {step}: {', '.join(broken)}: not finite"
    if wanted is not NonFinite.stop:
        log.warning(problem)
        return
    if step == 0:
        raise TrainingFailed(
            f"{problem}, before any update; look at the weights that the run starts from,"
            " or try precision=bf16 instead of fp16"
        )
    raise TrainingFailed(
        f"{problem}; try a smaller optimizer.lr, more scheduler.warmup_steps or precision=bf16 instead of fp16,"
        " and go on from a checkpoint before it"
    )


def validate(engine: Engine, data: DataSet, plan: Plan, runtime: Runtime, name: str | None = None) -> float:
    """Mean cross-entropy per valid token over the validation samples, the same on all ranks. A collective. name: one of
    `data.validation_sets`."""
    total, tokens = 0.0, 0.0
    with engine.averaged():
        for batch in watched(data.validation(name), "validation"):
            total += engine.evaluate(batch.to(runtime.device)).item()
            tokens += batch.valid_tokens() / plan.same_data
    total, all_tokens = runtime.sum(total, tokens)
    return total / max(1.0, all_tokens)
