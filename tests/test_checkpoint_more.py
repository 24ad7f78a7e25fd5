"""Resuming in harder cases: several mesh axes, optimizer states on disk, a changing loss scale, trackers.

For each layout, a run that resumes from its own checkpoint equals the uninterrupted run bit for bit. A run that resumes
from a single process's checkpoint repeats that process's steps within rounding.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_FINISHED, EXIT_STOPPED
from tests.support.deepspeed_cases import WIDE, build_or_skip
from tests.support.harness import Overrides, RankFailed, composed, composes, run_ranks
from tests.support.parity import words
from tests.support.resuming import (
    Journal,
    resume_each,
    saving,
    train_and_save,
    train_float16_then_resume,
    train_then_resume_each,
)
from tests.support.selection import rows
from tests.test_checkpoint_run import STEPS as RUN_STEPS
from tests.test_checkpoint_run import overrides as run_overrides
from tests.test_checkpoint_run import start

SAVED, STEPS = 2, 3
FLOAT32 = 1e-5
# layout -> number of processes, further overrides
LAYOUTS = {
    "ddp": (4, ("train.gradient_accumulation_steps=1",)),
    "tensor_fsdp": (4, ("parallel.sequence_parallel=true",)),
    "pipeline_fsdp": (4, ()),
    "context": (2, ()),
    "3d": (8, ()),
    "3d_zero1": (8, ()),
}
# One layout splits sequences, and one has two axes. test_checkpoint_layouts runs each single axis on every change.
OFTEN = ("context", "tensor_fsdp")
BATCH = ("train.gradient_accumulation_steps=2", "model.config.num_hidden_layers=2")


def overrides(layout: str, *more: str) -> list[str]:
    return words("llama", layout, "fp32", STEPS, *BATCH, *more)


def apart(found: Journal, expected: Journal) -> float:
    steps = range(SAVED + 1, STEPS + 1)
    assert list(found.lines) == list(steps)
    pairs = [(found.losses[step], expected.losses[step]) for step in steps]
    pairs += [(found.grad_norms[step], expected.grad_norms[step]) for step in steps]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def same_bits(found: Journal, alone: Journal, steps: Sequence[int] = range(SAVED + 1, STEPS + 1)) -> bool:
    assert sorted(found.lines) == list(steps)
    return found.lines == {step: alone.lines[step] for step in steps}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Journal]:
    folder = tmp_path_factory.mktemp("single")
    run_ranks(1, train_until_saved, overrides("single"), str(folder / "saved"))
    return folder / "saved", run_ranks(1, train_and_save, overrides("single"), str(folder / "alone"))[0]


@composes
def train_until_saved(words: Overrides, folder: str) -> Journal:
    return train_and_save(saving(composed(words), every=SAVED), folder, upto=SAVED)


@pytest.mark.parametrize("layout", rows(zip(LAYOUTS), lambda layout: layout in OFTEN))
def test_several_axes(layout: str, single: tuple[Path, Journal], tmp_path: Path) -> None:
    processes, more = LAYOUTS[layout]
    run = str(tmp_path / "run")
    ranks = run_ranks(
        processes, train_then_resume_each, overrides(layout, *more), run, [str(single[0])], SAVED, timeout=400
    )
    alone, own, from_single = ranks[0]
    assert same_bits(own, alone)
    assert apart(from_single, single[1]) <= FLOAT32
    back = run_ranks(1, resume_each, overrides("single"), [run], STEPS - SAVED)[0][0]
    assert apart(back, single[1]) <= FLOAT32


@pytest.mark.timeout(2400)
def test_states_on_nvme(tmp_path: Path) -> None:
    run = words("llama", "zero3_nvme", "fp32", STEPS, *WIDE, f"parallel.offload.nvme_path={tmp_path / 'nvme'}")
    (tmp_path / "nvme").mkdir()
    build_or_skip(run)
    fsdp = words("llama", "fsdp", "fp32", STEPS, *WIDE)
    expected, _ = run_ranks(2, train_then_resume_each, fsdp, str(tmp_path / "fsdp"), [], SAVED)[0]
    alone, own, from_fsdp = run_ranks(
        2, train_then_resume_each, run, str(tmp_path / "run"), [str(tmp_path / "fsdp")], SAVED, timeout=400
    )[0]
    assert same_bits(own, alone)
    assert apart(from_fsdp, expected) <= FLOAT32
    back = run_ranks(2, resume_each, fsdp, [str(tmp_path / "run")], STEPS - SAVED)[0][0]
    assert apart(back, expected) <= FLOAT32
    assert list((tmp_path / "nvme").iterdir()) == []


@pytest.mark.parametrize(
    ("layout", "processes"),
    rows([("single", 1), ("fsdp", 2), ("zero1", 2), ("zero3", 2)], lambda layout, _: layout in ("fsdp", "zero3")),
)
def test_a_loss_scale_goes_on_in_the_middle_of_its_window(layout: str, processes: int, tmp_path: Path) -> None:
    """The scale doubles after every second step. At the checkpoint it has changed, and one good step is counted."""
    more = (*BATCH, "precision.loss_scale_init=1024", "precision.loss_scale_window=2")
    run = words("llama", layout, "fp16", 5, *more)
    alone, own = run_ranks(processes, train_float16_then_resume, run, str(tmp_path), 3)[0]
    scales = [float(alone.lines[step].split()[2]) for step in sorted(alone.lines)]
    assert scales == [1024, 1024, 2048, 2048, 4096]
    assert same_bits(own, alone, [4, 5])


# A killed process closes none of its trackers.
SIGNALS = [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGKILL]


def interrupted(run: Path, *more: str, number: int, after: int) -> None:
    """Starts a run that gets the signal once the checkpoint of step `after` exists, and then starts it again."""
    given = run_overrides(run, *more, layout="single")
    if number == signal.SIGKILL:
        with pytest.raises(RankFailed):
            run_ranks(1, start, given, 0, (number,), str(run), after)
    else:
        assert run_ranks(1, start, given, 0, (number,), str(run), after) == [EXIT_STOPPED]
    assert run_ranks(1, start, given) == [EXIT_FINISHED]


@pytest.mark.parametrize(
    "number", rows([(signal.SIGTERM,), (signal.SIGKILL,)], lambda number: number == signal.SIGKILL)
)
def test_tensorboard_shows_every_step_once(number: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    interrupted(run, "logging=tensorboard", "logging.run_name=mine", number=number, after=6)
    events = EventAccumulator(str(run / "tensorboard" / "mine")).Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for kind, key in (("step", "loss"), ("validation", "validation_loss")):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if line["kind"] == kind]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected
    assert len(events.Scalars("loss")) == RUN_STEPS


@pytest.mark.parametrize(
    "number", rows([(signal.SIGTERM,), (signal.SIGKILL,)], lambda number: number == signal.SIGKILL)
)
def test_an_offline_wandb_run_has_every_step_once(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = tmp_path / "run"
    interrupted(run, "logging=wandb", number=number, after=6)
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    (earlier,) = (run / "wandb" / "earlier").glob("offline-run-*/run-*.wandb")
    assert earlier.name == file.name, "two runs"
    assert steps_in(file) == list(range(1, RUN_STEPS + 1))
    assert steps_in(file, "validation_loss") == [0, 4, 8, 12]


def steps_in(path: Path, key: str = "loss") -> list[int]:
    """Returns the steps that have a value of `key` in the file of an offline run."""
    from wandb.proto import wandb_internal_pb2 as messages

    steps = []
    for data in log_records(path.read_bytes()):
        record: Any = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if key in values:
                steps.append(int(json.loads(values["_step"])))
    return steps


def log_records(data: bytes) -> Iterator[bytes]:
    """Yields the records of a LevelDB log that follows a header of 7 bytes.

    The log consists of blocks of 32 KiB. A record consists of a CRC (4 bytes), a length (2 bytes), a kind (1 byte;
    1: whole, 2: first part, 3: middle, 4: last) and its content.
    """
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < 7 or kind == 0:
            at += left
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
