"""The work of a rank in the tests of the DeepSpeed engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from configs.errors import EnvironmentProblem
from configs.load import load_config
from configs.schema import Config
from tests.support import cases
from tests.support.cases import Trained
from tests.support.harness import Overrides, composed, composes, run_ranks
from tests.support.kernels import mark_complete, remove_stale_locks
from trainer.data.build import build_data
from trainer.engine import Engine, StepReport, build_engine
from trainer.engine.deepspeed import preflight
from trainer.engine.deepspeed.engine import DeepSpeedEngine
from trainer.engine.deepspeed.setup import import_deepspeed, load_kernels, needed_kernels
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.optim.build import lr_at
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, join_world
from trainer.run.step import StepResult, train_step

# Half of a matrix has at least 1 MiB, the size from which DeepSpeed swaps.
WIDE = (
    "train.gradient_accumulation_steps=2",
    "optimizer.lr=1e-3",
    "optimizer.eps=1e-5",
    "data.seq_len=16",
    "model.config.num_hidden_layers=2",
    "model.config.hidden_size=512",
    "model.config.intermediate_size=1024",
    "model.config.vocab_size=1031",
)


@composes
def train_validating(overrides: Overrides) -> tuple[Trained, dict[str, int], list[str]]:
    """Train with a validation pass of two batches before every step.

    Also returns {swap file: bytes} just before the engine is closed, and the paths left below nvme_path afterwards.
    """
    cases.train_step = _validate_and_step
    root = Path(composed(overrides).parallel.offload.nvme_path or "/nonexistent")
    files: dict[str, int] = {}
    close = DeepSpeedEngine.close

    def list_and_close(self: DeepSpeedEngine) -> None:
        files.update({str(f.relative_to(root)): f.stat().st_size for f in root.rglob("*") if f.is_file()})
        torch.distributed.barrier()
        close(self)
        torch.distributed.barrier()

    DeepSpeedEngine.close = list_and_close
    trained = cases.train(overrides)
    return trained, files, [str(path) for path in root.rglob("*")]


def _validate_and_step(engine: Engine, batches: Any, plan: Plan, runtime: Runtime, *rest: Any) -> StepResult:
    for _ in range(2):
        engine.evaluate(batches[0].to(runtime.device))
    return train_step(engine, batches, plan, runtime, *rest)


@composes
def train_float16(overrides: Overrides) -> Trained:
    allow_float16()
    return cases.train(overrides)


def allow_float16(allowed: bool = True) -> None:
    """DeepSpeed refuses float16 on CPUs without fast float16 matmuls. A test can use slow ones."""
    import_deepspeed("cpu")
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    type(accelerator).is_fp16_supported = lambda self: allowed


@dataclass
class Spoilt:
    """Results of a run with a non-finite gradient in one step and another step discarded.

    refused: whether the step with the bad gradient skipped its update.
    grad_norm: gradient norm that this step reported.
    same: whether the other losses, norms and the parameters equal those of a run without these two steps, bit by bit.
    """

    refused: bool
    grad_norm: float
    same: bool


@composes
def spoil_and_drop(overrides: Overrides, spoilt: int, dropped: int) -> Spoilt:
    """Train twice: with two bad steps, then without them.

    spoilt: step with a non-finite gradient on the last rank.
    dropped: step that is discarded.
    """
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        reports: list[StepReport] = []

        def with_bad_steps(engine: Engine, step: int, forward_backward: Callable[[], float]) -> list[float]:
            if step == spoilt:
                reports.append(_spoil(engine, runtime, forward_backward))
                return []
            loss = forward_backward()
            if step == dropped:
                engine.discard()
                return []
            return [loss, engine.step(lr_at(config, step)).grad_norm]

        def without_them(engine: Engine, step: int, forward_backward: Callable[[], float]) -> list[float]:
            if step in (spoilt, dropped):
                return []
            return [forward_backward(), engine.step(lr_at(config, step)).grad_norm]

        numbers, parameters = _train(config, plan, runtime, with_bad_steps)
        expected_numbers, expected = _train(config, plan, runtime, without_them)
        same = numbers == expected_numbers and all(torch.equal(parameters[name], expected[name]) for name in expected)
        return Spoilt(refused=not reports[0].updated, grad_norm=reports[0].grad_norm, same=same)


def _spoil(engine: Engine, runtime: Runtime, forward_backward: Callable[[], float]) -> StepReport:
    """Do a step with an infinite gradient in the embedding of the last rank."""
    handles: list[Any] = []
    if runtime.rank == runtime.world_size - 1:
        handles.append(engine.model.get_input_embeddings().register_forward_hook(_make_gradient_infinite))
    forward_backward()
    for handle in handles:
        handle.remove()
    # At this learning rate an update with the bad gradient would be visible.
    return engine.step(1.0)


def _make_gradient_infinite(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


def _train(
    config: Config, plan: Plan, runtime: Runtime, act: Callable[[Engine, int, Callable[[], float]], list[float]]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms that `act` returns for each step, and the final parameters (on rank 0)."""
    vocab_size = build_hf_config(config.model).vocab_size
    data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=vocab_size)
    engine, steps = build_engine(config, plan, runtime), data.steps()
    numbers: list[float] = []
    for step in range(config.train.steps):
        batches = next(steps)
        valid_tokens = torch.tensor(sum(runtime.gather(sum(batch.valid_tokens() for batch in batches))))
        numbers += act(engine, step, lambda b=batches, n=valid_tokens: engine.forward_backward(b, n).item())
    parameters = {name: value.clone() for name, value in engine.parameters() if value is not None}
    engine.close()
    return numbers, parameters


def problems_of_machine(overrides: list[str], environment: dict[str, str]) -> list[str]:
    """The problems that `preflight` reports under this environment."""
    os.environ.update(environment)
    config = load_config(overrides)
    try:
        preflight.check_deepspeed(config, make_plan(config, find_machine()))
    except EnvironmentProblem as error:
        return list(error.problems)
    return []


def problems_without_float16(overrides: list[str]) -> list[str]:
    allow_float16(False)
    return problems_of_machine(overrides, {})


def build_kernels(overrides: list[str]) -> None:
    """Compile the kernels of the run ahead of it, outside of its time limit."""
    config = load_config(overrides)
    plan = make_plan(config, find_machine())
    import_deepspeed("cpu")
    os.environ.setdefault("CXX", str(Path(__file__).with_name("fast-g++")))
    load_kernels(needed_kernels(config, plan), local_rank=0)
    mark_complete()


def build_or_skip(run: list[str]) -> None:
    """Compile the kernels of the run, or skip the test if there is no compiler. Call it in the test process.

    Compiling takes minutes, once for each set of versions.
    """
    found = run_ranks(1, problems_of_machine, run, {})[0]
    lacking = [problem for problem in found if "compiled at first use" in problem]
    if lacking:
        pytest.skip("; ".join(lacking))
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "compiling.lock"):
        remove_stale_locks()
        run_ranks(1, build_kernels, run, timeout=1800)
