"""The cost of 16-bit formats: changed or zero gradients, parameters that do not move, the loss after some steps.

The model is small and runs in one process on the CPU. Its vocabulary is large, so the gradients of its logits are
small. The table in docs/precision.md is written from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.support.harness import Overrides, composed, composes, run_ranks
from trainer.data.build import build_data
from trainer.engine.torch import TorchEngine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step

STEPS, LEARNING_RATE = 10, 1e-4
COMMON = [
    "model=tiny",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=96",
    "model.config.vocab_size=16384",
    "data=synthetic",
    "data.seq_len=32",
    "train.micro_batch_size=4",
    f"train.steps={STEPS}",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounded:
    """Results of a training under one precision.

    gradient: gradient of all parameters in the first step, flattened.
    zero_gradients: fraction of the head's gradient that is exactly zero.
    unmoved: fraction of all parameter values that never changed.
    loss: loss of the last step.
    """

    gradient: torch.Tensor
    zero_gradients: float
    unmoved: float
    loss: float


def rounded(overrides: list[str]) -> Rounded:
    """Train under a precision.

    overrides: the precision's preset and further overrides.
    """
    return run_ranks(1, _train, [*COMMON, *overrides])[0]


@composes
def _train(overrides: Overrides) -> Rounded:
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        vocabulary = build_hf_config(config.model).vocab_size
        steps = build_data(config, plan, data_rank=0, vocab_size=vocabulary).steps()
        engine = TorchEngine(config, plan, runtime)
        before = {name: value.detach().clone() for name, value in engine.named.items()}
        batches = next(steps)
        tokens = torch.tensor(float(sum(batch.valid_tokens() for batch in batches)), dtype=torch.float64)
        engine.forward_backward(batches, tokens)
        gradient = engine.named["lm_head.weight"].grad
        assert gradient is not None
        every = torch.cat([p.grad.flatten().float() for p in engine.named.values() if p.grad is not None])
        every /= engine.loss_scale.value if engine.loss_scale else 1
        zeros = (gradient == 0).double().mean().item()
        engine.discard()
        losses = [train_step(engine, next(steps), plan, runtime, LEARNING_RATE).loss for _ in range(STEPS)]
        unmoved = sum((engine.named[name] == value).sum().item() for name, value in before.items())
    return Rounded(
        gradient=every,
        zero_gradients=zeros,
        unmoved=unmoved / sum(value.numel() for value in before.values()),
        loss=losses[-1],
    )
