"""Whole runs through the entry point keep and export the best checkpoint, and end early."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_FINISHED, EXIT_STOPPED, PlanError
from configs.load import load_config
from tests.support.harness import run_ranks
from tests.support.parity import words
from tests.test_checkpoint_run import comparable_metrics, metrics, start
from trainer.__main__ import main
from trainer.checkpoint.__main__ import main as checkpoint_main
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.selection import METRIC, Selection
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.process.status import read_status

# The learning rate grows until the model gets worse, so the validation after step 2 is the best.
SETTINGS = (
    "optimizer.lr=1",
    "scheduler=constant",
    "scheduler.warmup_steps=60",
    "train.eval_every=2",
    "train.patience=3",
    "checkpoint.best=true",
    "checkpoint.every=3",
    "checkpoint.keep_last=1",
    "logging.progress=off",
    "cluster=cpu",
)

FILES = ("data=files", "data.paths=[v/]")


def overrides(folder: Path, *more: str) -> list[str]:
    return words("llama", "ddp", "fp32", 60, *SETTINGS, f"train.run_dir={folder}", *more)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_best_checkpoint_stays_and_the_run_ends_early(tmp_path: Path) -> None:
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    assert run_ranks(2, start, overrides(run)) == [EXIT_FINISHED] * 2
    losses = {line["step"]: line["validation_loss"] for line in metrics(run) if line["kind"] == "validation"}
    assert list(losses) == [0, 2, 4, 6, 8]
    assert min(losses[step] for step in (4, 6, 8)) > losses[2] < losses[0]
    assert [line["step"] for line in metrics(run) if line["kind"] == "checkpoint"] == [2, 3, 6, 8]
    assert [path.name for path in committed(run / CHECKPOINTS)] == [step_name(2), step_name(8)]
    best = {"metric": METRIC, "value": losses[2], "step": 2, "checkpoint": str(run / CHECKPOINTS / step_name(2))}
    status, summary = read_status(run), json.loads((run / "summary.json").read_text())
    why = f"3 validations in a row were no better than {losses[2]:.6g} (train.patience=3)"
    assert (status["state"], status["step"], status["exit_code"], status["reason"]) == ("finished", 8, 0, why)
    assert status["best"] == summary["best"] == best
    assert (summary["stopped_early"], summary["steps"]) == (why, 8)
    assert checkpoint_main(["export", str(run / CHECKPOINTS / "best"), str(tmp_path / "best")]) == 0
    assert checkpoint_main(["export", str(run), str(tmp_path / "last")]) == 0
    assert weights(run / "model") == weights(tmp_path / "best") != weights(tmp_path / "last")

    # A stop in between changes neither the count nor the best. A run that ended early resumes only with new patience.
    assert run_ranks(2, start, overrides(stopped), 1, (signal.SIGTERM,), str(stopped), 3) == [EXIT_STOPPED] * 2
    assert read_status(stopped)["best"] == {**best, "checkpoint": str(stopped / CHECKPOINTS / step_name(2))}
    assert run_ranks(2, start, overrides(stopped)) == [EXIT_FINISHED] * 2
    assert comparable_metrics(stopped) == comparable_metrics(run)
    assert weights(stopped / "model") == weights(run / "model")
    before = (stopped / "metrics.jsonl").read_bytes()
    alone = overrides(stopped, "parallel=single")
    ((codes, lines),) = run_ranks(1, start_each, alone, [*alone, "train.patience=4"])
    assert (codes, lines) == ([EXIT_FINISHED] * 2, before)
    assert (read_status(stopped)["step"], read_status(stopped)["waited"]) == (10, 4)


def start_each(same: list[str], more: list[str]) -> tuple[list[int], bytes]:
    """Return the exit codes of both runs, and metrics.jsonl as it was between them."""
    (run,) = (word.removeprefix("train.run_dir=") for word in same if word.startswith("train.run_dir="))
    first, lines = main(same), (Path(run) / "metrics.jsonl").read_bytes()
    return [first, main(more)], lines


def judged(selection: Selection, *values: float) -> Selection:
    for number, value in enumerate(values, start=1):
        selection.judge(number, {METRIC: value})
    return selection


def test_what_counts_as_better() -> None:
    config = load_config(["train.patience=2", "train.min_delta=0.1", "train.eval_every=1", "checkpoint.best=true"])
    creeping = judged(Selection(config), 3.0, 2.95, 2.92)
    assert creeping.best is not None
    assert (creeping.best.value, creeping.waited) == (2.92, 2), "each is the best, none is better by 0.1"
    assert creeping.ended is not None
    assert judged(Selection(config), 3.0, 2.95, 2.89).waited == 0, "better than 3.0 by more than 0.1 in two steps"
    assert judged(Selection(config), math.nan, math.nan).ended is not None
    # A checkpoint that could not be written is not the best, and no run continues from a deleted one.
    selection = judged(Selection(config), 3.0)
    selection.saved(selection.state())
    selection.judge(2, {METRIC: 2.0})
    assert selection.due(2)
    selection.lost(2)
    assert selection.best is not None
    assert (selection.best.value, selection.kept) == (3.0, 1)
    assert not selection.due(2)
    again = Selection(config)
    again.restore(selection.state(), {2, 3})
    assert (again.best, again.kept) == (None, None)
    again.restore(selection.state(), {1, 3})
    assert again.kept == 1


@pytest.mark.parametrize(
    ("given", "key", "remedy"),
    [
        (["checkpoint.best=true"], "checkpoint.best=true", "set train.eval_every above 0"),
        (["train.patience=2", "train.eval_every=5", "train.eval_samples=0"], "train.patience=2", "train.eval_samples"),
        (
            ["train.patience=2", "train.eval_every=50"],
            "train.patience=2",
            "could never end early; set one of them lower",
        ),
        (["train.min_delta=0.5"], "train.min_delta=0.5", "train.patience"),
        ([*FILES, "data.validation_sets={../v: [v/]}"], "data.validation_sets.../v", "a name has letters, digits, "),
        ([*FILES, "data.validation_sets={v: []}"], "data.validation_sets.v=[]", "name one, or leave the set out"),
        (
            [*FILES, "data.validation_sets={v: [v/]}", "train.eval_samples=0"],
            "data.validation_sets={'v': ['v/']}",
            "train.eval_samples=0 validates on nothing",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(given: list[str], key: str, remedy: str) -> None:
    with pytest.raises(PlanError) as refused:
        make_plan(load_config(["launcher=python", *given]), Machine())
    (line,) = refused.value.problems
    assert line.startswith(f"{key}: ")
    assert remedy in line


def test_a_run_without_a_best_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted: Any = tmp_path / CHECKPOINTS / "best"
    assert checkpoint_main(["verify", str(wanted)]) == 2
    assert "has kept no best checkpoint" in capsys.readouterr().err


def test_sets_with_names_are_validated_and_one_decides(tmp_path: Path) -> None:
    """The loss on the training text falls, that on the distant set rises; the distant set decides and ends the run."""
    for name, text in {"train": "abcdefgh " * 3000, "near": "abcdefgh " * 60, "far": "zyxw VUTS " * 60}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sets = f"{{near: [{tmp_path}/near.txt], far: [{tmp_path}/far.txt]}}"
    run = tmp_path / "run"
    config = [
        *("data=files", f"data.paths=[{tmp_path}/*.txt]", f"data.validation_sets={sets}", "data.seq_len=32"),
        *("model=tiny", "model.config.num_hidden_layers=1", "data.tokenizer=bytes", f"data.cache_dir={tmp_path}/cache"),
        *("train.steps=30", "train.global_batch_size=4", "train.eval_every=3", "train.eval_samples=4", "cluster=cpu"),
        *("data.validation_fraction=0", f"data.validation_paths=[{tmp_path}/near.txt]", "parallel=ddp"),
        *("optimizer.lr=0.01", "train.patience=2", "checkpoint.best=true", "train.eval_metric=validation_loss/far"),
        *("train.export=false", f"train.run_dir={run}"),
    ]
    assert run_ranks(2, start, config) == [EXIT_FINISHED] * 2
    lines = [line for line in metrics(run) if line["kind"] == "validation"]
    near, far = ([line["sets"][f"validation_loss/{name}"] for line in lines] for name in ("near", "far"))
    assert near == [line["validation_loss"] for line in lines], "the same file"
    assert near[-1] < near[0]
    status: Any = read_status(run)
    assert status["best"]["metric"] == "validation_loss/far"
    assert status["best"]["value"] == min(far[1:])
    assert status["waited"] == 2 and len(far) < 11
    assert far[-1] > min(far[1:])
    with pytest.raises(PlanError, match=r"train\.eval_metric=validation_loss/other: must be one of validation_loss"):
        make_plan(load_config(["launcher=python", "train.eval_metric=validation_loss/other"]), Machine())
