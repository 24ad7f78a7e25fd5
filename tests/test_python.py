"""`from cookbook import ...`: the functions of the command line, callbacks, and several runs in one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cookbook
import numpy as np
import pytest
from cookbook import Callback, Config, CookbookError, Result, compose, estimate, launch, plan, search, train

from configs.choices import Schedule
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED
from trainer.__main__ import main
from trainer.report.metrics import CheckpointMetrics, StepMetrics, Summary, ValidationMetrics

SMALL = (
    *("model=tiny", "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "parallel=single"),
    *("model.config.intermediate_size=64", "data=synthetic", "data.seq_len=16", "train.steps=4", "cluster.device=cpu"),
    *("train.global_batch_size=4", "train.eval_samples=4", "train.eval_every=2", "logging.progress=off"),
    *("checkpoint.every=2", "estimate.gate=off", "launcher=python", "optimizer.lr=0.01"),
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return compose(*SMALL)


class Heard(Callback):
    def __init__(self) -> None:
        self.lines: list[tuple[str, int]] = []

    def on_begin(self) -> None:
        assert self.run.rank == 0 and self.run.plan.world_size == 1
        assert sum(parameter.numel() for parameter in self.run.model.parameters()) > 1000
        self.lines.append(("begin", 0))

    def on_step(self, line: StepMetrics) -> None:
        self.lines.append(("step", line.step))

    def on_validation(self, line: ValidationMetrics) -> None:
        self.lines.append(("validation", line.step))

    def on_checkpoint(self, line: CheckpointMetrics) -> None:
        self.lines.append(("checkpoint", line.step))

    def on_end(self, line: Summary) -> None:
        self.lines.append(("end", line.steps))


class Stops(Callback):
    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_step(self, line: StepMetrics) -> None:
        if line.step == self.step:
            self.run.stop("enough")


class StopsLate(Callback):
    """Asks the run to stop when it has already ended."""

    def on_end(self, line: Summary) -> None:
        self.run.stop("late")


class Fails(Callback):
    def on_step(self, line: StepMetrics) -> None:
        raise ArithmeticError("of the user's own")


class Nested(Callback):
    def __init__(self, config: Config) -> None:
        self.config = config

    def on_begin(self) -> None:
        with pytest.raises(CookbookError, match="train: another run is under way in this process, and they would end"):
            train(self.config)
        with ThreadPoolExecutor(1) as threads, pytest.raises(CookbookError, match="launch: another run is under way"):
            threads.submit(launch, *SMALL).result()
        self.run.stop("seen")


class Takes(Callback):
    def __init__(self, needed: int) -> None: ...


def test_a_run_its_callbacks_and_a_second_run(config: Config) -> None:
    heard = Heard()
    first = train(config, [heard])
    assert first.finished and first.model is not None and (first.model / "config.json").exists()
    begun = [("begin", 0), ("validation", 0), ("step", 1), ("step", 2), ("validation", 2), ("checkpoint", 2)]
    assert heard.lines == [*begun, ("step", 3), ("step", 4), ("validation", 4), ("checkpoint", 4), ("end", 4)]
    # metrics.jsonl holds the same lines that the callbacks received.
    assert [(line["kind"], line.get("step")) for line in first.metrics][:-1] == heard.lines[1:-1]
    assert first.summary["loss_last"] < first.summary["loss_first"]
    # The caller's configuration is unchanged, and a second call with it makes a second run.
    assert config.train.run_dir is None and config == compose(*SMALL)
    second = train(config)
    assert second.folder != first.folder
    assert second.summary["loss_last"] == first.summary["loss_last"]


def test_a_callback_stops_and_the_same_call_goes_on(config: Config, tmp_path: Path) -> None:
    config.train.run_dir, config.scheduler.name = str(tmp_path / "run"), Schedule.constant
    stopped = train(config, [Stops()])
    assert (stopped.code, stopped.stopped, stopped.summary) == (EXIT_STOPPED, True, {})
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "rank 0: enough"
    assert train(config, [StopsLate()]).summary["steps"] == 4
    assert not (tmp_path / "run" / "STOP").exists()  # it would stop a later start with more steps
    steps = [line["step"] for line in train_lines(tmp_path / "run") if line["kind"] == "step"]
    assert steps == [1, 2, 3, 4]
    # With more steps the run is unfinished until it ends again.
    config.train.steps = 6
    stopped = train(config, [Stops(5)])
    assert (stopped.code, stopped.model, stopped.summary) == (EXIT_STOPPED, None, {})
    assert json.loads((tmp_path / "run" / "summary-step-4.json").read_text())["steps"] == 4


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_callback_raises_ends_the_run(config: Config) -> None:
    with pytest.raises(ArithmeticError, match="of the user's own"):
        train(config, [Fails()])


def test_one_run_at_a_time(config: Config) -> None:
    assert train(config, [Nested(config)]).stopped


def test_what_is_no_callback_is_said_before_the_run(config: Config, tmp_path: Path) -> None:
    with pytest.raises(CookbookError) as raised:
        train(config, [Heard, print])  # pyright: ignore[reportArgumentType]
    assert [problem.partition(" is no ")[0] for problem in raised.value.problems] == [
        f"callbacks: {Heard!r}",
        "callbacks: <built-in function print>",
    ]
    with pytest.raises(CookbookError, match=r"callbacks=Heard: must be a list: train\(config, \[callback\]\)"):
        train(config, Heard())  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "runs").exists()


def test_callbacks_by_their_path(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = f"train.run_dir={tmp_path}/run"
    assert main([*SMALL, folder, "train.callbacks=[tests.test_python.Stops]"]) == EXIT_STOPPED
    wrong = "[Stops, no.such.Thing, tests.test_python.Stop, pathlib.Path, tests.test_python.Takes]"
    capsys.readouterr()
    assert main([*SMALL, f"train.callbacks={wrong}"]) == EXIT_BAD_CONFIG
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train.callbacks=[Stops]: is no path of a class; give package.module.Class"
    assert lines[1].startswith("train.callbacks=[no.such.Thing]: cannot import no.such (ModuleNotFoundError: ")
    assert lines[2] == "train.callbacks=[tests.test_python.Stop]: tests.test_python has no Stop; did you mean Stops?"
    assert lines[3].startswith("train.callbacks=[pathlib.Path]: is no subclass of trainer.report.callbacks.Callback;")
    assert lines[4].startswith("train.callbacks=[tests.test_python.Takes]: cannot be made without arguments (TypeError")


def test_plan_and_estimate_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*SMALL[:6], "parallel=fsdp", "cluster=8xh100", "precision=bf16")
    config = compose(*words)
    assert plan(config).mesh["dp_shard"] == 8
    from launch.estimate import main as memory_estimate

    assert memory_estimate([*words, "estimate.format=json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert estimate(config).busiest.peak_allocated_bytes == printed["ranks"][0]["peak_allocated_bytes"]


def test_search_ranks_what_fits() -> None:
    found = search(compose("model=tiny", "cluster=8xh100", "cluster.gpus_per_node=2", "train.global_batch_size=8"))
    times = [ranked.time.total for ranked in found.best]
    assert times and times == sorted(times)


def test_mistakes_are_the_lines_of_the_command_line(config: Config) -> None:
    with pytest.raises(CookbookError) as raised:
        compose("train.stepz=3", "parallel=zero9")
    assert len(raised.value.problems) >= 1 and "train.stepz" in str(raised.value)
    config.train.steps = "many"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CookbookError, match=r"train\.steps=many: must be a whole number"):
        train(config)
    config.train.steps, config.optimizer.lr = 0, -1.0
    with pytest.raises(CookbookError, match=r"(?s)optimizer\.lr=-1\.0: must be .*train\.steps=0: must be 1 or more"):
        plan(config)
    config.train.steps = np.int64(4)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(CookbookError, match=r"train\.steps=int64: must be a whole number"):
        plan(config)
    with pytest.raises(CookbookError, match="launch waits for a run on this machine"):
        launch(*SMALL, "dry_run=true")


def test_a_folder_may_be_a_path(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config.train.run_dir = folder  # pyright: ignore[reportAttributeAccessIssue]
    assert plan(config).world_size == 1
    assert config.train.run_dir is folder
    config = compose("data=custom", "data.target=tests.support.data_of_users.Rows", "data.options.count=3")
    config.data.options["path"] = folder
    with pytest.raises(CookbookError, match=rf"data\.options\.path={folder}: "):
        plan(config)


def test_launch_waits_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a thread of a program with other child processes, which the run must not end."""
    monkeypatch.chdir(tmp_path)
    with subprocess.Popen(["sleep", "600"]) as other, ThreadPoolExecutor(1) as threads:
        try:
            done = threads.submit(launch, *SMALL, "train.export=false").result()
            assert (done.code, done.summary["steps"], done.model) == (EXIT_FINISHED, 4, None)
            assert other.poll() is None
        finally:
            other.kill()


def test_a_run_that_failed_early_has_no_metrics(tmp_path: Path) -> None:
    assert Result(tmp_path, EXIT_BAD_CONFIG).metrics == []


def test_the_chapter_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    first, parts = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    exec(compile(first, "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    assert "MiB predicted" in said and re.search(r"^6 5\.\d+$", said, re.MULTILINE)
    # The keys of the page's table work with the parts that the page shows.
    (tmp_path / "my_parts.py").write_text(parts)
    np.arange(20 * 33, dtype=np.uint16).clip(max=259).tofile("rows.bin")
    keys = [key for row in re.findall(r"`(\w+=custom [^`]*)`", text) for key in row.split()]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 260}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    small = [f"model.config.{name}={size}" for name, size in (sizes | heads).items()]
    short = ["data.seq_len=32", "train.steps=2", "parallel=single", "cluster=cpu", "logging.progress=off"]
    result = train(compose(*keys, *small, *short))
    assert result.finished and (result.folder / "numbers.txt").read_text().startswith("0 {'validation_loss")


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs cell by cell in one namespace, as in a kernel, and is stored without outputs."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((Path(__file__).parent.parent / "docs" / "first-steps.ipynb").read_text())["cells"]
    space: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    said = capsys.readouterr().out
    assert "optimizer.learning_rate=0.01: no such key; here it is" in said and "MiB of tensors predicted" in said
    assert "\ndef " in said and space["losses"][-1] < space["losses"][0]


def test_the_import_is_light() -> None:
    code = "import sys, cookbook; print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {name for name in cookbook.__all__ if getattr(cookbook, name, None) is None} == set()
