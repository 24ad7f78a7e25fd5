"""The work of a rank in a test of updates inside the backward: planted bugs, and a non-finite gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from configs.errors import TrainingFailed
from tests.support.cases import Trained, train
from tests.support.harness import Overrides, composed, composes
from trainer.axes import gradients
from trainer.data import Batch
from trainer.engine import build_engine
from trainer.engine.in_backward import InBackward
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world


def _replicas_not_averaged() -> AbstractContextManager[Any]:
    return patch.object(InBackward, "replicas", property(lambda self: None, lambda self, group: None), create=True)


BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "other_random_numbers": lambda: patch("trainer.engine.in_backward._set_random_state", lambda device, states: None),
    "replicas_not_averaged": _replicas_not_averaged,
    "norm_of_this_rank": lambda: patch.object(gradients, "_splitting_axes", lambda gradient, groups: frozenset()),
}


@composes
def train_with(overrides: Overrides, bug: str) -> Trained:
    with BUGS[bug]():
        return train(overrides)


@composes
def one_infinite_gradient(overrides: Overrides) -> tuple[str, bool]:
    """The error of a step with an infinite gradient, and whether the step changed a parameter."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        engine = build_engine(config, plan, runtime)
        named = list(engine.model.named_parameters())
        before = [parameter.detach().clone() for _, parameter in named]
        named[0][1].register_hook(lambda gradient: gradient * float("inf"))
        tokens = torch.randint(0, 100, (plan.batch.micro_batch_size, plan.batch.seq_len))
        message = ""
        try:
            engine.forward_backward([Batch(tokens, tokens)], torch.tensor(float(tokens.numel())))
            assert not engine.step(1e-3).updated
        except TrainingFailed as error:
            message = str(error)
        return message, any(not torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
