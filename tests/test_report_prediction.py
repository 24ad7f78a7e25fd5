"""Every run compares its memory estimate with the measured peak, and a failed estimate never ends a run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED
from tests.support.harness import run_ranks
from tests.support.reports import config_and_plan
from tests.support.selection import rows
from trainer.__main__ import main
from trainer.estimate.estimate import Estimate
from trainer.process.runtime import join_world
from trainer.report import prediction
from trainer.report.metrics import Comparison
from trainer.report.prediction import MemoryCheck, predict


def run(words: list[str]) -> tuple[int, str]:
    """Return the exit code and output of a run on one rank."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        return main(words), heard.getvalue()


def words(folder: Path, *more: str) -> list[str]:
    common = ["model=tiny", "data=synthetic", "data.seq_len=32", "train.steps=3", "cluster=cpu", "train.export=false"]
    return [*common, f"train.run_dir={folder}/run", f"data.cache_dir={folder}/cache", *more]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/summary.json").read_text())["memory"]


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    rows(
        [(["parallel=tensor"], 0.01), (["parallel=pipeline"], 0.05), (["parallel=zero3", "precision=bf16"], 0.1)],
        lambda layout, _: layout != ["parallel=pipeline"],
    ),
)
def test_a_run_that_counts_its_tensors_tells_how_far_off_the_prediction_was(
    layout: list[str], tolerance: float, tmp_path: Path
) -> None:
    more = [
        "estimate.measure=true",
        "train.eval_samples=4",
        "checkpoint.every=2",
        "logging=tensorboard",
        "logging.run_name=mine",
    ]
    (code, shown), (other, _) = run_ranks(2, run, words(tmp_path, *layout, *more))
    assert code == other == EXIT_FINISHED, shown
    found = summary(tmp_path)
    assert found["memory_ratio"] == pytest.approx(1, abs=tolerance)
    assert found["memory_ratio"] == found["measured_allocated_bytes"] / found["predicted_allocated_bytes"]
    assert found["memory_rank"] in (0, 1) and found["memory_note"] is None
    assert f": ratio {found['memory_ratio']:.3f}\n" in shown
    # metrics.jsonl and the tracker report the same numbers.
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["memory"] == found
    assert tracked(tmp_path / "run/tensorboard/mine", "memory_ratio") == [(3, pytest.approx(found["memory_ratio"]))]


@pytest.mark.parametrize(("steps", "measured"), [(3, False), (9, True)])
def test_updates_are_counted_not_steps(steps: int, measured: bool, tmp_path: Path) -> None:
    """A loss scale of 2**20 overflows and is halved each time, so optimizer states appear late or never."""
    scale = ["precision=fp16", "precision.loss_scale_init=1048576", "estimate.measure=true", f"train.steps={steps}"]
    ((code, shown),) = run_ranks(1, run, words(tmp_path, "parallel=single", *scale))
    assert code == EXIT_FINISHED, shown
    found = summary(tmp_path)
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_steps"] > 1
    assert (found["memory_ratio"] is not None) is measured
    assert (
        found["memory_ratio"] == pytest.approx(1, abs=0.05)
        if measured
        else found["memory_note"] == prediction.TOO_SHORT
    )


def tracked(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_unasked_a_cpu_run_predicts_and_says_that_nothing_is_measured(tmp_path: Path) -> None:
    ((code, shown),) = run_ranks(1, run, words(tmp_path, "parallel=single"))
    assert code == EXIT_FINISHED, shown
    found = summary(tmp_path)
    assert found["predicted_allocated_bytes"] > 2**20 and found["measured_allocated_bytes"] is None
    assert found["memory_note"] == prediction.NOT_COUNTED
    kept = json.loads((tmp_path / "run/prediction.json").read_text())
    assert sum(kept["components"].values()) == kept["peak_allocated_bytes"] == found["predicted_allocated_bytes"]
    took = re.search(
        r"^memory     peak (\d+) MiB in the largest process = (\d+) MiB Python and its libraries, (\d+) MiB tensors"
        r" \(predicted; estimate.measure=true counts the tensors of a CPU process\), (\d+) MiB"
        r" buffers of libraries and allocator$",
        shown,
        re.MULTILINE,
    )
    assert took and abs(int(took[1]) - sum(map(int, took.groups()[1:]))) <= 2
    assert "of tensors per process predicted\n" in shown


def test_an_estimate_that_breaks_is_a_note_in_a_run_that_goes_on(tmp_path: Path) -> None:
    ((code, shown),) = run_ranks(1, run_with_a_broken_estimator, words(tmp_path, "parallel=single"))
    assert code == EXIT_FINISHED, shown
    found = summary(tmp_path)
    assert found["memory_note"] == "not estimated: ZeroDivisionError: no such number"
    assert found["predicted_allocated_bytes"] is None
    assert shown.count("not estimated: ZeroDivisionError") == 2 and "Traceback" not in shown


def run_with_a_broken_estimator(words: list[str]) -> tuple[int, str]:
    def broken(*_: object, **__: object) -> Estimate:
        raise ZeroDivisionError("no such\nnumber")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "estimate", broken)
        return run(words)


def test_the_furthest_rank_is_named_whichever_way_it_is_off(tmp_path: Path) -> None:
    ranks = run_ranks(3, compare, str(tmp_path))
    predicted = ranks[0].predicted_allocated_bytes
    assert replace(ranks[0], libraries_bytes=None) == Comparison(
        predicted_allocated_bytes=predicted,
        predicted_reserved_bytes=predicted,
        predicted_reserved_most_bytes=predicted,
        measured_allocated_bytes=predicted // 2,
        memory_ratio=(predicted // 2) / predicted,
        memory_rank=2,
        predicted_bytes_by_rank=[predicted] * 3,
        measured_bytes_by_rank=[predicted, predicted * 3 // 2, predicted // 2],
    )
    assert ranks[1:] == [Comparison(), Comparison()]


def compare(folder: str) -> Comparison:
    """Rank 1 used 1.5 times its prediction, rank 2 half of it. Rank 2 is further off: a ratio of 2 is above 1.5."""
    config, plan = config_and_plan(Path(folder), "parallel=ddp", f"data.cache_dir={folder}")
    predicted = predict(config, plan)
    with join_world(plan, timeout_minutes=1) as runtime, MemoryCheck(config, plan, runtime, predicted) as memory:
        estimated = runtime.gather(predicted.estimate and predicted.estimate.busiest.peak_allocated_bytes)[0]
        assert estimated is not None
        memory._measured = ((estimated, None), (estimated * 3 // 2, None), (estimated // 2, None))[runtime.rank]
        return memory.compare()


def test_a_run_draws_the_same_numbers_whether_or_not_its_estimate_was_cached(tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python", f"data.cache_dir={tmp_path}", "model=tiny_gpt2")
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        assert predict(config, plan).estimate is not None
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_measuring_is_refused_where_it_would_say_nothing(tmp_path: Path) -> None:
    ((code, shown),) = run_ranks(1, run, words(tmp_path, "estimate.measure=true", "train.compile=true"))
    assert code == EXIT_BAD_CONFIG
    assert "estimate.measure=true: counts operator by operator" in shown
