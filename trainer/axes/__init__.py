"""Mesh axes. Each is a module that declares its name, its refusals and the facts that the plan needs. The files that
change a model import torch; these do not.

    pp             `pipeline`    layers over ranks                  `pipeline.split`, `pipeline.run`
    dp_replicate   `replicate`   copies of the model                `ddp`
    dp_shard       `shard`       parameters divided for storage     `fsdp`
    cp             `context`     sequences over ranks               `sequence`
    tp             `tensor`      matrices over ranks                `tensor.apply`
    ep             `expert`      experts over the ranks of dp_shard, cp and tp, in a view of its own   `expert.apply`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from configs.schema import Config
from trainer.axes import context, expert, pipeline, replicate, shard, tensor
from trainer.plan.views import DENSE, Axis


class MeshAxis(Protocol):
    @property
    def AXIS(self) -> Axis: ...

    @staticmethod
    def problems(config: Config) -> Iterator[str]:
        """Refusals of the axis, and keys that only it reads if its degree is 1. One line each."""
        ...


MODULES: tuple[MeshAxis, ...] = (pipeline, replicate, shard, context, tensor, expert)
"""From outer to inner: tensor parallel, which communicates most, is on neighbouring ranks."""

AXES = tuple(module.AXIS for module in MODULES)
PIPELINE, REPLICATE, SHARD, CONTEXT, TENSOR, EXPERTS = (axis.name for axis in AXES)


SENDING = {TENSOR: tensor.sends, CONTEXT: context.sends, EXPERTS: expert.sends}
"""The axes whose ranks communicate inside layers, and their messages."""


def degrees(config: Config) -> dict[str, int | None]:
    """Degrees of the dense view, as in the config; None is filled from the world size."""
    return {axis.name: getattr(config.parallel, axis.name) for axis in AXES if DENSE in axis.views}


def dividing_degrees(config: Config) -> dict[str, int]:
    """The degrees above 1 of axes that divide every layer or its sequences, innermost first."""
    return {
        axis.name: degree
        for axis in reversed(AXES)
        if not axis.reads and DENSE in axis.views and (degree := getattr(config.parallel, axis.name)) > 1
    }


def problems(config: Config) -> Iterator[str]:
    for module in reversed(MODULES):
        yield from module.problems(config)
