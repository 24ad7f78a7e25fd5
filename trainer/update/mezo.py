"""MeZO (Malladi et al. 2023, arXiv:2305.17333): the loss at two points instead of a gradient. No backward.

    w + eps z:  forward -> loss+          z: one random number per parameter, from the step's seed
    w - eps z:  forward -> loss-          slope = (loss+ - loss-) / (2 eps), one number, the same on every rank
    w - lr * slope * z

z is never stored: it is drawn for one whole parameter at a time, and each rank takes its own piece, so that every
layout trains on the same numbers. A step keeps no gradients, no states, and activations of one layer only.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName
from configs.schema import Config, Optimizer
from trainer import moe
from trainer.axes import PIPELINE
from trainer.optim import mezo
from trainer.optim.by_role import KEY as ROLES
from trainer.optim.by_role import names
from trainer.optim.table import chosen_by
from trainer.plan.batch import BatchPlan
from trainer.update.passes import Passes

GRADIENTS = False


def wanted(settings: Optimizer) -> bool:
    return chosen_by(settings, mezo) is not None


def problems(config: Config, batch: BatchPlan) -> Iterator[str]:
    key, parallel = chosen_by(config.optimizer, mezo), config.parallel
    for role, name in names(config.optimizer).items():
        yield f"{ROLES}.{role}.name={name}: mezo moves all parameters along one direction; leave it out"
    if parallel.engine is EngineName.deepspeed:
        yield (
            f"{key}: has no gradients and no states, which is what ZeRO partitions; use parallel=fsdp, which shards the"
            " parameters"
        )
    if (degree := getattr(parallel, PIPELINE)) > 1:
        yield f"{key}: parallel.{PIPELINE}={degree} orders forwards with their backwards; use parallel=fsdp or tensor"
    if config.optimizer.in_backward:
        yield "optimizer.in_backward=true: mezo runs no backward; leave it out"
    if config.train.clip_grad_value:
        yield (
            f"train.clip_grad_value={config.train.clip_grad_value}: mezo has one slope, and no"
            " elements to clip; use train.clip_grad_norm, which limits the slope"
        )
    if config.optimizer.ema:
        yield f"optimizer.ema={config.optimizer.ema}: mezo keeps no states; leave it out"
    for name in ("label_smoothing", "neftune_alpha"):
        if value := getattr(config.train, name):
            yield (f"train.{name}={value}: mezo follows the loss of a validation, which is the plain one; leave it out")
    if moe.acts(config):
        yield f"{moe.asked(config)}: acts through gradients, and mezo has none; leave it out"


def passes(config: Config) -> Passes:
    return Passes(forwards=2, backwards=0)


def description(config: Config) -> str:
    return "no backward: the loss at two points, along a direction that is drawn again from its seed"
