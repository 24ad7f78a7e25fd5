"""Helpers of the tests of trainer/report: one process as a rank, and a tiny run without training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from configs.load import load_config
from configs.schema import Config
from trainer.engine import StepReport
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model
from trainer.plan.machine import Machine, find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, join_world
from trainer.report.folder import open_run_folder
from trainer.report.measure import StepSeconds
from trainer.report.reporter import Reporter
from trainer.run.step import StepResult

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@contextmanager
def lone_runtime(plan: Plan) -> Iterator[Runtime]:
    """Make this process the only rank. The environment is restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.setenv(name, "")
            patch.delenv(name)
        with join_world(plan, timeout_minutes=1) as runtime:
            yield runtime


def config_and_plan(folder: Path | None, *overrides: str) -> tuple[Config, Plan]:
    """Config and plan on the CPU: four steps of 2 x 8 tokens per rank, without validation, in `folder`."""
    words = ["train.steps=4", "train.micro_batch_size=2", "data.seq_len=8", "cluster=cpu", *overrides]
    config = load_config([*words, f"train.run_dir={folder}"] if folder else words)
    return config, make_plan(config, find_machine())


def lone_plan(*overrides: str) -> Plan:
    return make_plan(load_config(["launcher=python", *overrides]), Machine())


def tiny_model(config: Config) -> PreTrainedModel:
    """A model with names and shapes but no values."""
    return build_model(config.model, build_hf_config(config.model))


def result(loss: float = 2.0, *, valid_tokens: int = 15, **report: Any) -> StepResult:
    return StepResult(
        loss=loss, valid_tokens=valid_tokens, report=StepReport(**{"grad_norm": 1.5, "updated": True, **report})
    )


def report_run(config: Config, plan: Plan, runtime: Runtime, steps: Sequence[StepResult], seconds: StepSeconds) -> Path:
    """Report these steps as the loop does, with a validation before and after them. Returns the run folder."""
    folder = open_run_folder(config, plan, runtime)
    with Reporter(config, plan, runtime, folder, model=tiny_model(config), data="made up") as reporter:
        reporter.validation(0, 5.0)
        for number, step in enumerate(steps, start=1):
            reporter.step(number, step, 1e-3, seconds)
        reporter.validation(len(steps), 4.0)
    return folder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]
