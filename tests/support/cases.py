"""The work of a rank in a parity test: a short training run through the real plan, data, engine and step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch

from tests.support.harness import Overrides, composed, composes
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, text_config
from trainer.optim.build import lr_at
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step, validate


@dataclass
class Trained:
    """Results of a training run. The lists have one entry per step.

    grad_norms: norms before clipping.
    updated: whether the step made an update.
    validation: validation loss at the end.
    parameters: final parameters by name, on rank 0 only.
    """

    losses: list[float]
    grad_norms: list[float]
    updated: list[bool]
    loss_scales: list[float | None]
    validation: float
    parameters: dict[str, torch.Tensor]


@composes
def train(overrides: Overrides) -> Trained:
    """Run `train.steps` steps of the config on this rank."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        data = build_data(
            config,
            plan,
            data_rank=plan.data_rank(runtime.rank),
            vocab_size=text_config(build_hf_config(config.model)).vocab_size,
        )
        engine = build_engine(config, plan, runtime)
        steps = data.steps()
        rates = [lr_at(config, step) for step in range(config.train.steps)]
        results = [train_step(engine, next(steps), plan, runtime, rate) for rate in rates]
        reports = [result.report for result in results]
        trained = Trained(
            losses=[result.loss for result in results],
            grad_norms=[report.grad_norm if report else float("nan") for report in reports],
            updated=[report is not None and report.updated for report in reports],
            loss_scales=[report.loss_scale if report else None for report in reports],
            validation=validate(engine, data, plan, runtime),
            parameters={name: value for name, value in engine.parameters() if value is not None},
        )
        engine.close()
        return trained


def run_trainer(overrides: list[str]) -> int:
    """Do a whole run through the entry point inside the job. Returns the exit code."""
    from trainer.__main__ import main

    return main(overrides)


@composes
def train_compiled(overrides: Overrides) -> tuple[Trained, int]:
    """Like `train`, with torch.compile's tracing but without its code generation.

    Also returns the number of graphs.
    """
    from torch._dynamo.utils import counters

    compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True)
    with patch("trainer.compile.torch.compile", compile_):
        trained = train(overrides)
    return trained, counters["stats"]["unique_graphs"]
