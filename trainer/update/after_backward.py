"""The default: gradients accumulate over the micro-batches, the last backward communicates, then all are updated."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName
from configs.schema import Config, Optimizer
from trainer.plan.batch import BatchPlan
from trainer.update.passes import Passes

GRADIENTS = True


def wanted(settings: Optimizer) -> bool:
    return True


def problems(config: Config, batch: BatchPlan) -> Iterator[str]:
    value = config.train.clip_grad_value
    if value and config.parallel.engine is EngineName.deepspeed:
        yield f"train.clip_grad_value={value}: DeepSpeed clips by the global norm alone; use train.clip_grad_norm"


def passes(config: Config) -> Passes:
    return Passes()


def description(config: Config) -> str:
    return ""
