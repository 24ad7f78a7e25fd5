"""`profile=true` writes its files, changes no number, and stops recording if the run fails."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import _profiler_enabled  # pyright: ignore[reportPrivateImportUsage]

from configs.errors import EXIT_FAILED, EXIT_FINISHED, ConfigError, PlanError
from configs.schema import Config
from tests.support.harness import run_ranks
from tests.support.reports import config_and_plan, lone_plan, lone_runtime, read_metrics
from tests.support.selection import rows
from trainer.__main__ import main
from trainer.report.memory_curve import SHARES, Recorder, from_snapshot
from trainer.report.prediction import Prediction
from trainer.run.profiling import Profiler

RESIZE = torch.UntypedStorage.resize_
MIB = 2**20


def run(words: list[str]) -> tuple[int, str, bool]:
    """Return the run's exit code and output, and whether a profiler still records."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        code = main(words)
    return code, heard.getvalue(), recording()


def recording() -> bool:
    return _profiler_enabled() or torch.UntypedStorage.resize_ is not RESIZE


def words(folder: Path, name: str, *more: str) -> list[str]:
    common = ["model=tiny", "data=synthetic", "data.seq_len=32", "train.steps=4", "cluster=cpu", "train.export=false"]
    common += ["checkpoint.final=false", "train.eval_samples=4"]
    return [*common, f"train.run_dir={folder}/{name}", f"data.cache_dir={folder}/cache", *more]


def trace_names(file: Path) -> set[str]:
    return {event.get("name", "") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}


@pytest.mark.parametrize(
    ("layout", "kinds"), rows([("fsdp", 1), ("pipeline", 2), ("zero2", 1)], lambda layout, _: layout == "pipeline")
)
def test_a_profiled_run_leaves_its_files_and_the_same_numbers(layout: str, kinds: int, tmp_path: Path) -> None:
    plain = run_ranks(2, run, words(tmp_path, "plain", f"parallel={layout}"))
    profiled = run_ranks(2, run, words(tmp_path, "profiled", f"parallel={layout}", "profile=true"))
    assert [(code, still) for code, _, still in plain + profiled] == [(EXIT_FINISHED, False)] * 4, profiled[0][1]

    keys = ("step", "loss", "grad_norm", "validation_loss")
    numbers = [
        [[line.get(key) for key in keys] for line in read_metrics(tmp_path / name)] for name in ("plain", "profiled")
    ]
    assert numbers[0] == numbers[1], "profiling changed a number"

    assert not (tmp_path / "plain/profile").exists()
    folder = tmp_path / "profiled/profile"
    for rank in (0, 1):
        names = trace_names(folder / f"trace-rank{rank}.json.gz")
        assert {"step 3", "step 4", "data", "forward_backward", "optimizer"} <= names
        assert not {"step 1", "step 2"} & names, "only the chosen steps"
    content = json.loads((folder / "memory.json").read_text())
    assert len(content) == kinds
    for rank in content:
        measured = max(max(part["bytes"]) for part in rank["measured"])
        assert {(part["step"], part["part"]) for part in rank["measured"]} == {
            (step, part) for step in (1, 2) for part in ("forward_backward", "optimizer")
        }
        assert measured == pytest.approx(max(moment["bytes"] for moment in rank["predicted"]), rel=0.05)
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    last = profiled[0][1].splitlines()[-1]
    assert last.startswith(f"profile    {folder}: trace-rank0.json.gz") and "https://ui.perfetto.dev" in last
    assert "profile    " not in profiled[1][1], "rank 0 alone tells"


def test_a_run_that_fails_in_a_traced_step_leaves_nothing_recording(tmp_path: Path) -> None:
    """The gradient of the first traced step is not finite."""
    bad = words(tmp_path, "bad", "optimizer.lr=1e30", "scheduler=constant", "profile=true", "profile_steps=[2,3,4]")
    ((code, heard, still),) = run_ranks(1, run, bad)
    assert (code, still) == (EXIT_FAILED, False)
    assert "not finite" in heard


@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_error_inside_a_step_ends_the_recording(step: int, tmp_path: Path) -> None:
    config, plan = profiled_config(tmp_path, "profile_steps=[2,3]")
    with lone_runtime(plan) as runtime:
        profiler = Profiler(config, plan, runtime, tmp_path, Prediction())
        with pytest.raises(ZeroDivisionError), profiler:
            for number in range(1, step + 1):
                with profiler.step(number):
                    assert recording()
                    torch.ones(4).add(1 // (step - number))
    assert not recording()


def test_steps_apart_have_a_trace_each(tmp_path: Path) -> None:
    config, plan = profiled_config(tmp_path, "profile_steps=[1,3]")
    with lone_runtime(plan) as runtime, Profiler(config, plan, runtime, tmp_path, Prediction()) as profiler:
        for number in range(1, 5):
            with profiler.step(number):
                profiler.mark("forward_backward")
                torch.ones(4).add(1)
    first, second = (trace_names(tmp_path / "profile" / f"trace-rank0{end}.json.gz") for end in ("", "-2"))
    steps = {f"step {number}" for number in range(1, 5)}
    assert (first & steps, second & steps) == ({"step 1"}, {"step 3"})


def test_a_start_without_a_chosen_step_says_so(tmp_path: Path) -> None:
    """The run resumed from a checkpoint after all chosen steps."""
    config, plan = profiled_config(tmp_path, "profile_steps=[1]")
    with lone_runtime(plan) as runtime, Profiler(config, plan, runtime, tmp_path, Prediction()) as profiler:
        with profiler.step(3):
            pass
        assert profiler.describe() == "profile    nothing: this start of the run had none of profile_steps=[1]"


@pytest.mark.parametrize("steps", ["[]", "[4,5]"])
def test_steps_that_the_run_has_not_are_refused(steps: str) -> None:
    with pytest.raises(PlanError, match=r"profile_steps=.*: must name steps of the run, which are 1 to 4"):
        lone_plan("train.steps=4", "profile=true", f"profile_steps={steps}")
    lone_plan("train.steps=4", f"profile_steps={steps}")


@pytest.mark.parametrize("steps", ["[0]", "[-1]"])
def test_steps_that_no_run_has_are_refused(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps=.*: each must be 1 or more"):
        lone_plan("train.steps=4", f"profile_steps={steps}")


def test_a_short_run_may_leave_profiling_alone() -> None:
    assert lone_plan("train.steps=1").steps == 1


def test_the_history_of_an_allocator_becomes_the_same_curve() -> None:
    entries = [
        ("alloc", 100, 5),
        ("segment_alloc", 4096, 6),
        ("alloc", 50, 10),
        ("free_requested", 50, 12),
        ("free_completed", 50, 13),
        ("alloc", 7, 21),
        ("alloc", 1000, 35),
    ]
    traces = [[], [{"action": action, "size": size, "time_us": time} for action, size, time in entries]]
    marks = [(8, 1, "data"), (9, 1, "forward_backward"), (20, 1, "optimizer"), (30, 1, "")]
    assert from_snapshot({"device_traces": traces}, 1, marks) == {
        (1, "forward_backward"): [100, 150, 100],
        (1, "optimizer"): [100, 107],
    }


def test_a_long_part_keeps_its_peak() -> None:
    from trainer.estimate.tracker import Born, Died

    recorder = Recorder()
    recorder.mark(1, "forward_backward")
    for number in range(10 * SHARES):
        recorder(Born(number, 7 if number == 77 else 1, "made"))
        recorder(Died(number))
    (sizes,) = recorder.curve().values()
    assert len(sizes) == SHARES and max(sizes) == 7 and set(sizes) == {1, 7}


def profiled_config(folder: Path, *more: str) -> tuple[Config, Any]:
    return config_and_plan(folder, "launcher=python", "profile=true", *more)
