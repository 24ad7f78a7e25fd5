"""How gradients become an update. Each way is one module of this folder and answers without torch:

wanted      whether the optimizer's settings choose it
problems    what it cannot be combined with, and why: one line each
passes      how often a step runs the model forward and backward
GRADIENTS   whether the gradients of the whole model are there at once, between the backward and the update
said        what it does, for the estimate's explanation; empty for the usual way

after_backward   gradients add up, the last backward communicates, one update
    in_backward      each gradient is applied and freed as it comes
    mezo             no gradients: the loss at two points
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from configs.schema import Config, Optimizer
from trainer.plan.batch import BatchPlan
from trainer.update import after_backward, in_backward, mezo
from trainer.update.passes import Passes


class Update(Protocol):
    @property
    def GRADIENTS(self) -> bool: ...

    def wanted(self, settings: Optimizer) -> bool: ...

    def problems(self, config: Config, batch: BatchPlan) -> Iterator[str]: ...

    def passes(self, config: Config) -> Passes: ...

    def description(self, config: Config) -> str: ...


UPDATES: tuple[Update, ...] = (mezo, in_backward, after_backward)


def ask(settings: Optimizer) -> Update:
    return next(update for update in UPDATES if update.wanted(settings))


def problems(config: Config, batch: BatchPlan) -> Iterator[str]:
    train = config.train
    if train.clip_grad_value and train.clip_grad_norm:
        yield (
            f"train.clip_grad_value={train.clip_grad_value}: train.clip_grad_norm={train.clip_grad_norm} clips too; set"
            " one of the two to 0"
        )
    yield from ask(config.optimizer).problems(config, batch)
