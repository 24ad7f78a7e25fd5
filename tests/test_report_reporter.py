"""The reporter as the loop calls it: the lines it writes, their content, and the files of an interrupted run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.errors import EnvironmentProblem
from tests.support.harness import run_ranks
from tests.support.reports import config_and_plan, lone_runtime, read_metrics, report_run, result, tiny_model
from trainer.process.runtime import join_world
from trainer.report import reporter as reporter_module
from trainer.report.folder import open_run_folder
from trainer.report.measure import StepSeconds
from trainer.report.reporter import Reporter
from trainer.run.step import StepResult

SECONDS = StepSeconds(step=0.5, data=0.1, forward_backward=0.3, optimizer=0.05)


def test_lines_come_as_often_as_asked_and_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = config_and_plan(tmp_path / "run", "launcher=python", "train.steps=6", "logging.every=3")
    steps = [
        result(3.0),
        result(2.5, updated=False, grad_norm=math.inf, loss_scale=8.0),
        result(2.0, loss_scale=4.0),
        StepResult(loss=math.nan, valid_tokens=15, report=None),
        result(1.5),
        result(1.0),
    ]
    with lone_runtime(plan) as runtime:
        folder = report_run(config, plan, runtime, steps, SECONDS)
    lines = read_metrics(folder)
    assert [(line["kind"], line.get("step")) for line in lines] == [
        ("validation", 0), ("step", 1), ("step", 3), ("step", 6), ("validation", 6), ("summary", None),
    ]  # fmt: skip
    assert [line["tokens"] for line in lines] == [0, 16, 48, 96, 96, 96]
    assert [line["valid_tokens"] for line in lines if "valid_tokens" in line] == [15, 45, 90, 90]
    assert [line["skipped_steps"] for line in lines if line["kind"] == "step"] == [0, 1, 2]
    third = lines[2]
    assert (third["loss"], third["grad_norm"], third["lr"], third["loss_scale"]) == (2.0, 1.5, 1e-3, 4.0)
    assert third["tokens_per_second"] == 32.0
    assert third["step_seconds"] == 0.5
    assert third["forward_backward_seconds"] == pytest.approx(0.3)
    assert third["mfu"] is None
    assert third["peak_allocated_bytes"] is None
    assert third["peak_host_bytes"] > 2**25
    summary = lines[-1]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["loss_first"], summary["loss_last"], summary["steps"]) == (3.0, 1.0, 6)
    assert (summary["validation_loss_first"], summary["validation_loss_last"]) == (5.0, 4.0)
    assert summary["run_dir"] == str(folder)
    shown = capsys.readouterr().out
    assert shown.startswith("data       made up\nmodel      LlamaForCausalLM, 804,992 parameters, random weights\n")
    assert "step 6/6  loss 1.0000  grad_norm 1.50  lr 1.00e-03  32 tokens/s  500 ms/step  skipped_steps 2\n" in shown
    assert shown.endswith(f"run        {folder}\n")


def test_speed_is_that_of_the_median_step_without_the_first(tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python")
    with lone_runtime(plan) as runtime:
        folder = open_run_folder(config, plan, runtime)
        with Reporter(config, plan, runtime, folder, model=tiny_model(config), data="") as reporter:
            for number, seconds in enumerate((100.0, 2.0, 4.0, 50.0), start=1):
                reporter.step(number, result(), 1e-3, StepSeconds(seconds, 0.0, seconds, 0.0))
    assert read_metrics(folder)[-1]["tokens_per_second"] == plan.batch.tokens / 4.0


def test_a_run_that_breaks_off_leaves_its_metrics_and_no_summary(tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python")
    with lone_runtime(plan) as runtime:
        folder = open_run_folder(config, plan, runtime)
        reporter = Reporter(config, plan, runtime, folder, model=tiny_model(config), data="")
        with pytest.raises(KeyboardInterrupt), reporter:
            reporter.step(1, result(), 1e-3, SECONDS)
            raise KeyboardInterrupt
    assert [line["kind"] for line in read_metrics(folder)] == ["step"]
    assert not (folder / "summary.json").exists()


def test_the_exported_model_is_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python")
    with lone_runtime(plan) as runtime:
        folder = open_run_folder(config, plan, runtime)
        with Reporter(config, plan, runtime, folder, model=tiny_model(config), data="") as reporter:
            reporter.step(1, result(), 1e-3, SECONDS)
            reporter.exported(folder / "model")
    assert read_metrics(folder)[-1]["model_dir"] == str(folder / "model")
    assert f"model      {folder / 'model'}\n" in capsys.readouterr().out


class Unreachable:
    """A tracker whose server is unreachable after the first line."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        self.logged.append(step)
        if step > 1:
            raise ConnectionError("no route\nto host")

    def finish(self, *, failed: bool) -> None:
        raise AssertionError("a tracker that was given up is not called again")


def test_a_tracker_that_goes_away_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Unreachable()
    monkeypatch.setattr(reporter_module, "start_tracker", lambda *_, **__: tracker)
    config, plan = config_and_plan(tmp_path, "launcher=python", "logging=wandb")
    with lone_runtime(plan) as runtime:
        folder = report_run(config, plan, runtime, [result()] * 4, SECONDS)
    assert tracker.logged == [0, 1, 2]
    assert [line["kind"] for line in read_metrics(folder)].count("step") == 4
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("logging.tracker=")]
    line = Unreachable.log.__code__.co_firstlineno + 3
    assert warnings == [
        f"logging.tracker=wandb: failed (ConnectionError: no route to host, at {__file__}:{line} in log) and is not"
        f" used from here on; {folder / 'metrics.jsonl'} goes on"
    ]


def two_ranks(folder: str) -> tuple[int, int]:
    """Report a step in which rank 1 is slower and uses more memory."""
    config, plan = config_and_plan(Path(folder), "parallel=ddp", "train.steps=2")
    block = b"\1" * (2**27)
    with join_world(plan, timeout_minutes=1) as runtime:
        if not runtime.is_main:
            block += block
        slow = 1.0 + runtime.rank
        seconds = StepSeconds(step=slow, data=0.1 * slow, forward_backward=0.5 / slow, optimizer=0.0)
        report_run(config, plan, runtime, [result(), result()], seconds)
    return runtime.rank, len(block)


def test_the_slowest_and_the_fullest_rank_are_reported(tmp_path: Path) -> None:
    assert run_ranks(2, two_ranks, str(tmp_path / "run")) == [(0, 2**27), (1, 2**28)]
    step = read_metrics(tmp_path / "run")[2]
    assert step["step_seconds"] == 2.0
    assert step["data_seconds"] == pytest.approx(0.2)
    assert step["forward_backward_seconds"] == pytest.approx(0.5)
    assert step["tokens_per_second"] == 2 * 2 * 8 / 2.0
    # The peak is that of rank 1, which holds 128 MiB more.
    assert step["peak_host_bytes"] > 2**28


def refused(folder: str) -> tuple[str, ...]:
    """Return the problems on this rank; only rank 0 starts the tracker, whose client refuses the option."""
    config, plan = config_and_plan(Path(folder), "parallel=ddp", "logging=tensorboard", "logging.options.nonsense=1")
    with join_world(plan, timeout_minutes=1) as runtime:
        try:
            report_run(config, plan, runtime, [result()], SECONDS)
        except EnvironmentProblem as error:
            return error.problems
    return ()


def test_every_rank_learns_that_an_output_cannot_be_opened(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (problem,), (same,) = run_ranks(2, refused, str(tmp_path / "run"))
    assert problem == same
    assert problem.startswith("logging.tracker=tensorboard: does not start (TypeError: ")
    assert problem.endswith("; mend logging.options or its environment, or set logging.tracker=none")
