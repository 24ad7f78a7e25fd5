"""SIGKILL at any file operation of a save loses no committed step, and the run resumes bit for bit.

A journal holds the loss and gradient norm of each step to the last bit, and a hash of all parameters and optimizer
states. The journal of a run that was killed and restarted equals the journal of an uninterrupted run.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import words
from tests.support.resuming import Journal, count_file_operations, train_and_die, train_and_save
from tests.support.selection import rows
from trainer.checkpoint.catalog import CHECKPOINTS, committed
from trainer.checkpoint.manifest import check_contents, check_file_sizes, read_manifest

STEPS = 4
# Each step is saved, and each save deletes the checkpoint before it. Dropout is on.
SETTINGS = ("checkpoint.every=1", "checkpoint.keep_last=1", "model.config.resid_pdrop=0.1", "model.config.n_layer=1")
POINTS = 12


def overrides(layout: str, *more: str) -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, *more)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return run_ranks(1, train_and_save, overrides("single"), str(tmp_path_factory.mktemp("alone")))[0]


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> int:
    return run_ranks(1, count_file_operations, overrides("single"), str(tmp_path_factory.mktemp("counted")))[0]


def last_known_commit(folder: Path) -> int:
    record = folder / "committed.txt"
    return max(map(int, record.read_text().split())) if record.exists() else 0


def whole(folder: Path) -> list[int]:
    """Steps of the committed checkpoints; each is read and checked to the last byte."""
    steps = []
    for path in committed(folder / CHECKPOINTS):
        manifest = read_manifest(path)
        check_file_sizes(path, manifest)
        check_contents(path, manifest, manifest.files)
        steps.append(manifest.step)
    return steps


@pytest.mark.parametrize("part", rows(zip(range(POINTS)), lambda part: part % 2 == 0))
def test_killed_at_any_file_operation(part: int, left_alone: Journal, operations: int, tmp_path: Path) -> None:
    assert operations > 4 * POINTS
    with pytest.raises(RankFailed, match="died"):
        run_ranks(1, train_and_die, overrides("single"), str(tmp_path), 0, operations * part // POINTS)
    known = last_known_commit(tmp_path)
    assert max(whole(tmp_path), default=0) >= known
    journal = run_ranks(1, train_and_save, overrides("single"), str(tmp_path))[0]
    # A run that is killed during the last deletions already has its last checkpoint, so no step is left.
    assert sorted(journal.lines) == list(range(min(journal.lines, default=STEPS + 1), STEPS + 1))
    assert min(journal.lines, default=STEPS + 1) > known, "a committed step was trained again"
    assert journal.lines == {step: left_alone.lines[step] for step in journal.lines}
    # The next save deletes the checkpoint that the killed run was about to delete. No step left means no next save.
    left = [STEPS] if journal.lines else [step for step in (STEPS - 1, STEPS) if step in whole(tmp_path)]
    assert whole(tmp_path) == left and left[-1] == STEPS
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [f"step-{step:08d}" for step in left]


@pytest.fixture(scope="module")
def two_left_alone(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return run_ranks(2, train_and_save, overrides("fsdp"), str(tmp_path_factory.mktemp("two")))[0]


@pytest.mark.parametrize(("rank", "at"), rows([(0, 20), (1, 4), (1, 9)], lambda rank, at: at != 4))
def test_one_of_two_ranks_killed_while_saving(rank: int, at: int, two_left_alone: Journal, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="died"):
        run_ranks(2, train_and_die, overrides("fsdp"), str(tmp_path), rank, at)
    known = last_known_commit(tmp_path)
    journal = run_ranks(2, train_and_save, overrides("fsdp"), str(tmp_path))[0]
    assert known < min(journal.lines) <= STEPS
    assert journal.lines == {step: two_left_alone.lines[step] for step in journal.lines}


@pytest.mark.parametrize("layout", ["single", "zero3"])
def test_saving_aside_commits_only_what_is_whole(layout: str, left_alone: Journal, tmp_path: Path) -> None:
    """While training runs, every folder with a checkpoint's name is complete to the last byte at any moment."""
    processes = {"single": 1, "zero3": 2}[layout]
    aside = overrides(layout, "checkpoint.async_save=true", "checkpoint.keep_last=10")
    ended, seen = threading.Event(), set[int]()

    def look() -> None:
        while not ended.is_set():
            seen.update(whole(tmp_path))
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            journal = run_ranks(processes, train_and_save, aside, str(tmp_path))[0]
        finally:
            ended.set()
        looking.result()
    if layout == "single":
        assert journal.lines == left_alone.lines
    assert seen, "the poller saw no checkpoint"
    assert whole(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("part", rows(zip(range(3)), lambda part: part == 1))
def test_killed_while_saving_aside(part: int, left_alone: Journal, operations: int, tmp_path: Path) -> None:
    aside = overrides("single", "checkpoint.async_save=true")
    with pytest.raises(RankFailed, match="died"):
        run_ranks(1, train_and_die, aside, str(tmp_path), 0, operations * (2 * part + 1) // 6)
    known = last_known_commit(tmp_path)
    journal = run_ranks(1, train_and_save, aside, str(tmp_path))[0]
    assert known < min(journal.lines) <= STEPS
    assert journal.lines == {step: left_alone.lines[step] for step in journal.lines}
