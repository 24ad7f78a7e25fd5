"""The length of a run: `train.steps`, or as many steps as `train.epochs` take. Torch-free.

The data set is not read before a run begins, so a plan with epochs has 0 steps until the data is there. `settle`
then writes the numbers where all other code reads them: `train.steps`, `scheduler.warmup_steps`, `plan.steps`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil

from configs.choices import Exhausted
from configs.errors import DataError, PlanError
from configs.schema import Config, Train
from trainer.plan.batch import BatchPlan
from trainer.plan.plan import Plan


def planned_steps(config: Config) -> int:
    """The steps of the run as far as the configuration gives them; 0: the data decides."""
    return 0 if config.train.epochs else config.train.steps


def steps_of(config: Config, batch: BatchPlan, *, count: int | None, until_exhausted: int | None) -> int:
    """The steps of the run. count: samples per epoch. until_exhausted: samples before the first source of the data is
    exhausted. Raises DataError if that is less than one step."""
    steps = planned_steps(config)
    if not steps:
        assert count is not None
        # The beginning of the next epoch fills up the last step.
        steps = ceil(Fraction(str(config.train.epochs)) * count / batch.global_batch_size)
    if config.data.exhausted is Exhausted.stop and until_exhausted is not None:
        steps = min(steps, until_exhausted // batch.global_batch_size)
        if not steps:
            raise DataError(
                f"data.exhausted=stop: the data ends after {until_exhausted} samples, before a step of"
                f" {batch.global_batch_size}; give more data, or a smaller train.global_batch_size"
            )
    return steps


def warmup_steps(config: Config, steps: int) -> int:
    """Steps of the warm-up in a run of `steps`."""
    ratio = config.scheduler.warmup_ratio
    return ceil(Fraction(str(ratio)) * steps) if ratio else config.scheduler.warmup_steps


def settle(config: Config, plan: Plan, steps: int) -> Plan:
    """Set the length that the data gives. Raises PlanError if the configuration does not fit that length."""
    config.train.steps = steps
    config.scheduler.warmup_steps = warmup_steps(config, steps)
    if problems := list(_check_steps(config, steps)):
        raise PlanError(*problems)
    return replace(plan, steps=steps)


def check_length(config: Config) -> Iterator[str]:
    """Problems of a run's length; torch-free, before there is any data."""
    train, scheduler = config.train, config.scheduler
    if train.epochs and train.steps != Train().steps:
        yield (
            f"train.epochs={train.epochs:g}: train.steps={train.steps} says how long the run is; give one of them"
            f" (train.steps={Train().steps} is as if it was not given)"
        )
    if scheduler.warmup_ratio and scheduler.warmup_steps:
        yield (
            f"scheduler.warmup_ratio={scheduler.warmup_ratio}: scheduler.warmup_steps={scheduler.warmup_steps} says how"
            " long the warm-up is; give one of them"
        )
    if steps := planned_steps(config):
        yield from _check_steps(config, steps)


def _check_steps(config: Config, steps: int) -> Iterator[str]:
    """Settings that do not fit a run of this number of steps."""
    yield from _check_schedule(config, steps)
    yield from _check_profile(config, steps)
    yield from _check_patience(config, steps)


def _check_schedule(config: Config, steps: int) -> Iterator[str]:
    scheduler, warmup = config.scheduler, warmup_steps(config, steps)
    if warmup + scheduler.decay_steps > steps:
        ratio = scheduler.warmup_ratio
        given = f"warmup_ratio={ratio} ({warmup} steps)" if ratio else f"warmup_steps={warmup}"
        yield (
            f"scheduler.{given}: with scheduler.decay_steps={scheduler.decay_steps} it is"
            f" longer than train.steps={steps}; shorten it"
        )


def _check_profile(config: Config, last: int) -> Iterator[str]:
    steps = config.profile_steps
    if config.profile and (not steps or not all(1 <= step <= last for step in steps)):
        yield (
            f"profile_steps={steps}: must name steps of the run, which are 1 to {last} (train.steps); set"
            f" profile_steps=[{last}], or more steps"
        )


def _check_patience(config: Config, steps: int) -> Iterator[str]:
    """The first validation is always the best one so far."""
    train = config.train
    if not train.patience or not train.eval_every or not train.eval_samples:
        return
    validations = ceil(steps / train.eval_every)
    if train.patience >= validations:
        yield (
            f"train.patience={train.patience}: train.eval_every={train.eval_every} makes {validations} validation(s) in"
            f" {steps} steps, so the run could never end early; set one of them lower, or leave train.patience out"
        )
