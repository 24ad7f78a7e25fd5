"""A full or unreadable disk ends a run with one line and a recorded status, whichever file it affects."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED
from launch.__main__ import main as launch
from tests.support.disks import closed_to_all, fill, small_disk, take_inodes
from tests.support.harness import run_ranks
from tests.support.parity import words
from trainer.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS
from trainer.process.status import LOCK, read_status

STEPS = 16
SETTINGS = ("model.config.n_layer=1", "train.eval_samples=0", "logging.progress=off", "cluster=cpu")


def overrides(run: Path, *more: str, layout: str = "single") -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, f"train.run_dir={run}", *more)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="16m") as folder:
        yield folder


def start(words: list[str], disk: str = "", place: str = "") -> tuple[int, list[str]]:
    """Returns the run's exit code and the lines of its stderr. Rank 0's disk is full from `place` on."""
    if os.environ["RANK"] == "0" and place:
        PLACES[place](Path(disk))
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        return main(words), heard.getvalue().splitlines()


def start_closed(words: list[str], path: str) -> tuple[int, list[str]]:
    """Like `start`, but permissions close the file or folder to everybody."""
    with closed_to_all(Path(path)):
        return start(words)


def at_second_step(take: Callable[[Path], Path]) -> Callable[[Path], None]:
    def plant(disk: Path) -> None:
        import trainer.run.loop

        train_step, calls = trainer.run.loop.train_step, itertools.count(1)

        def planted(*arguments: Any) -> Any:
            if next(calls) == 2:
                take(disk)
            return train_step(*arguments)

        trainer.run.loop.train_step = planted

    return plant


def at_export(disk: Path) -> None:
    import trainer.run.loop

    export_model = trainer.run.loop.export_model

    def planted(*arguments: Any, **more: Any) -> None:
        fill(disk)
        export_model(*arguments, **more)

    trainer.run.loop.export_model = planted


def at_tokenizer(disk: Path) -> None:
    from transformers import PreTrainedTokenizerBase

    save_pretrained = PreTrainedTokenizerBase.save_pretrained

    def planted(*arguments: Any, **more: Any) -> Any:
        full = fill(disk)
        try:
            return save_pretrained(*arguments, **more)
        finally:
            full.unlink()

    PreTrainedTokenizerBase.save_pretrained = planted


PLACES = {
    "space": at_second_step(fill),
    "inodes": at_second_step(take_inodes),
    "export": at_export,
    "tokenizer": at_tokenizer,
}


def failed(run: Path) -> str:
    """Returns the reason of a run that has failed for good."""
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["retry"]) == ("failed", EXIT_FAILED, False), status
    return str(status["reason"])


def test_no_space_for_metrics_ends_every_rank_in_one_line(disk: Path) -> None:
    run = disk / "run"
    more = ("checkpoint.every=0", "checkpoint.final=false", "train.export=false")
    first, second = run_ranks(2, start, overrides(run, *more, layout="ddp"), str(disk), "space")
    assert first[0] == second[0] == EXIT_FAILED
    (line,) = first[1]
    assert line.startswith(f"metrics.jsonl: cannot be written to {run} (No space left on device, 0.0 MiB are free); ")
    assert second[1] == []
    assert failed(run) == line


def test_no_space_for_the_export_ends_in_one_line_and_the_same_command_goes_on(disk: Path) -> None:
    run = disk / "run"
    ((code, lines),) = run_ranks(1, start, overrides(run), str(disk), "export")
    (line,) = lines
    assert code == EXIT_FAILED
    assert line.startswith(
        f"the finished model: cannot be written to {run / 'model'} (No space left on device, 0.0 MiB"
    )
    assert failed(run) == line
    assert not list(run.glob("model*"))
    (disk / "filler").unlink()
    ((code, lines),) = run_ranks(1, start, overrides(run))
    assert code == EXIT_FINISHED
    assert any(line.startswith(f"resumed    step {STEPS} from ") for line in lines)
    assert (run / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("on_failure", ["warn", "stop"])
def test_no_space_for_the_tokenizer_in_a_checkpoint(on_failure: str, disk: Path) -> None:
    run = disk / "run"
    more = (f"checkpoint.on_failure={on_failure}", "train.export=false")
    ((code, lines),) = run_ranks(1, start, overrides(run, *more), str(disk), "tokenizer")
    (line,) = (line for line in lines if "checkpoint" in line)
    assert line.startswith(f"checkpoint of step {STEPS}: no space for it in {run / CHECKPOINTS}: needs ")
    assert line.endswith("; training goes on without it") == (on_failure == "warn")
    assert list((run / CHECKPOINTS).iterdir()) == []
    assert code == (EXIT_FINISHED if on_failure == "warn" else EXIT_FAILED)
    if on_failure == "stop":
        assert failed(run) == line


def test_no_inodes_are_no_lack_of_space(disk: Path) -> None:
    run = disk / "run"
    ((code, lines),) = run_ranks(1, start, overrides(run), str(disk), "inodes")
    assert code == EXIT_FAILED
    (line,) = lines
    assert line.startswith(f"checkpoint of step {STEPS}: no inodes for it in {run / CHECKPOINTS}: ")
    assert failed(run) == line


def test_a_start_on_a_full_disk_is_one_line(disk: Path) -> None:
    many = take_inodes(disk)
    ((code, lines),) = run_ranks(1, start, overrides(disk / "run"))
    assert code == EXIT_BAD_CONFIG
    (line,) = lines
    assert line.startswith(
        f"train.run_dir={disk / 'run'}: cannot be written (no inodes left for new files, though 16.0 MiB are free); "
    )
    shutil.rmtree(many)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", [LOCK, CHECKPOINTS, "config.yaml", "."])
def test_a_run_folder_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / CHECKPOINTS).mkdir(parents=True)
    (run / LOCK).touch()
    (run / "config.yaml").write_text("{}")
    ((code, lines),) = run_ranks(1, start_closed, overrides(run), str(run / name))
    assert code == EXIT_BAD_CONFIG
    (line,) = lines
    assert re.search(rf"{run}[^ ]*: cannot be (read|written) \(Permission denied\); ", line), line


def test_a_lock_that_a_launcher_cannot_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / LOCK).touch()
    with closed_to_all(tmp_path / LOCK):
        assert launch(overrides(tmp_path)) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err == f"{tmp_path / LOCK}: cannot be read (Permission denied); make it readable\n"


def test_a_finished_run_goes_on_with_more_steps_under_a_constant_schedule(tmp_path: Path) -> None:
    """The metrics contain invalid lines, which the resumed run leaves out."""
    run, constant = tmp_path / "run", "scheduler=constant"
    ((code, _),) = run_ranks(1, start, overrides(run, constant, "train.steps=8"))
    assert code == EXIT_FINISHED
    metrics = run / "metrics.jsonl"
    foreign = [b'{"loss": 1.0}', b"[1]", b"3", b'{"kind": "step"}', b'{"kind": "step", "step": "x"}', b"\xff\xfe\x00"]
    metrics.write_bytes(b"\n".join([*foreign, metrics.read_bytes()]) + b'{"kind": "step", "step": 3')
    ((code, lines),) = run_ranks(1, start, overrides(run, "scheduler=cosine"))
    assert code == EXIT_BAD_CONFIG
    assert lines == [
        f"train.steps={STEPS}: the run in {run} is finished, at step 8, and scheduler=cosine has brought the learning"
        f" rate to its end there; begin a new run with train.resume={run} and another train.run_dir, or give"
        " scheduler=constant to go on in this one"
    ]
    assert run_ranks(1, start, overrides(run, constant))[0][0] == EXIT_FINISHED
    assert run_ranks(1, start, overrides(tmp_path / "alone", constant))[0][0] == EXIT_FINISHED
    assert losses(run) == losses(tmp_path / "alone")
    assert read_status(run)["step"] == STEPS
    first, second, alone = (
        (folder / "model.safetensors").read_bytes()
        for folder in (run / "model-step-8", run / "model", tmp_path / "alone" / "model")
    )
    assert first != second == alone


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"]
