"""Combinations that an optimizer refuses, and why. Torch-free; read by `rules`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from configs.choices import Implementation
from configs.schema import Config, Optimizer
from trainer.optim import paged
from trainer.optim.options import check_options
from trainer.optim.parts import named
from trainer.optim.table import OPTIMIZERS, ask
from trainer.plan.views import View

OWN = ("beta1", "beta2", "eps", "weight_decay", "target")
"""Keys that only some optimizers read."""


def check_optimizer(config: Config, device: str, view: View) -> Iterator[str]:
    """One line for each problem of `optimizer`. device: "cpu" or "cuda". view: the plan's dense view of its ranks."""
    optimizer = config.optimizer
    chosen = ask(optimizer)
    yield from _check_implementation(optimizer)
    yield from _check_unused(optimizer)
    yield from check_options(optimizer, chosen.OPTIONS)
    yield from chosen.problems(config, view)
    yield from paged.problems(config, device, OPTIMIZERS)


def _check_implementation(optimizer: Optimizer) -> Iterator[str]:
    asked, has = optimizer.implementation, ask(optimizer).IMPLEMENTATIONS
    if asked is not Implementation.auto and asked not in has:
        names = " with ".join(dict.fromkeys(str(one.name) for one in named(optimizer).values()))
        yield (
            f"optimizer.implementation={asked}: {names} has no such implementation; use"
            f" {', '.join(str(one) for one in has)} or auto"
        )


def _check_unused(optimizer: Optimizer) -> Iterator[str]:
    """A number that was given and that this optimizer would not read."""
    defaults = {item.name: item.default for item in fields(Optimizer)}
    for key in OWN:
        value = getattr(optimizer, key)
        if key not in ask(optimizer).USES and value != defaults[key]:
            readers = [str(name) for name, other in OPTIMIZERS.items() if key in other.USES]
            does = f"{', '.join(readers)} {'do' if len(readers) > 1 else 'does'}"
            yield f"optimizer.{key}={value}: {optimizer.name} does not read it, {does}; leave it out"
