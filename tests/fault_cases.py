"""One fault of a run at a time: injected, then survived, or the case raises AssertionError saying what was lost.

The judge is the journal: of every step the bits of loss and gradient norm and a hash of all parameters and optimizer
states. What a killed run and the start after it computed must be, line by line, what a run computes that is left alone.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.errors import EXIT_FAILED, EXIT_STOPPED, CheckpointDamaged
from tests import resuming
from tests.harness import RankFailed, run_ranks
from tests.parity import words
from tests.resuming import Journal
from trainer.checkpoint import catalog
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.manifest import check_contents, check_sizes, read_manifest
from trainer.status import read_status

STEPS = 6
SETTINGS = ("checkpoint.every=1", "checkpoint.keep_last=2", "model.config.resid_pdrop=0.1", "model.config.n_layer=1")
PROCESSES = {"single": 1, "fsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


@dataclass
class Bench:
    """What the cases of one run of the script share. seed: of every choice that a case makes."""

    folder: Path
    random: random.Random
    _alone: dict[tuple[str, ...], tuple[Journal, float, list[list[str]]]] = field(default_factory=dict)
    _count: int = 0

    def place(self) -> Path:
        """A new empty folder."""
        self._count += 1
        folder = self.folder / f"{self._count:04d}"
        folder.mkdir()
        return folder

    def alone(self, layout: str, *more: str) -> tuple[Journal, float, list[list[str]]]:
        """Of a run that is left alone: its journal, the seconds it took, and each rank's operations on files."""
        key = (layout, *more)
        if key not in self._alone:
            before = time.monotonic()
            ranks = run_ranks(PROCESSES[layout], resuming.list_file_operations, plain(layout, *more), str(self.place()))
            journal, seconds = ranks[0][1], time.monotonic() - before
            self._alone[key] = journal, seconds, [operations for operations, _ in ranks]
        return self._alone[key]


def plain(layout: str, *more: str) -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, *more)


def survive(bench: Bench, run: Path, layout: str, *more: str) -> int:
    """Start again in `run`, to the end. Returns the first step that was trained; no committed one may be among them."""
    told = run / "committed.txt"
    known = max(map(int, told.read_text().split())) if told.exists() else 0
    newest = max((whole(path) for path in committed(run / CHECKPOINTS)), default=0)
    assert newest >= known, f"step {known} was committed, {newest} is what is left"
    journal = run_ranks(PROCESSES[layout], resuming.train_and_save, plain(layout, *more), str(run))[0]
    first = min(journal.lines, default=STEPS + 1)
    assert first == newest + 1, f"step {newest} was committed, the run went on with {first}"
    alone = bench.alone(layout, *more)[0]
    assert journal.lines == {step: alone.lines[step] for step in journal.lines}, "another journal"
    assert all(path.name.startswith("step-") for path in (run / CHECKPOINTS).iterdir()), "leftovers"
    return first


def whole(checkpoint: Path) -> int:
    """The step of a checkpoint that is complete to the last byte. Raises CheckpointDamaged."""
    manifest = read_manifest(checkpoint)
    check_sizes(checkpoint, manifest)
    check_contents(checkpoint, manifest, manifest.files)
    return manifest.step


def killed_at_a_file_operation(bench: Bench, layout: str, *more: str) -> None:
    """C1 (one rank), C2 (one of two), C11 (deletions are among the operations)."""
    run, rank = bench.place(), bench.random.randrange(PROCESSES[layout])
    at = bench.random.randrange(len(bench.alone(layout, *more)[2][rank]))
    with pytest.raises(RankFailed, match="died"):
        run_ranks(PROCESSES[layout], resuming.train_and_die, plain(layout, *more), str(run), rank, at)
    survive(bench, run, layout, *more)


def killed_at_any_time(bench: Bench, layout: str, *more: str) -> None:
    """C3, C4: also before the first checkpoint (C12). A run that was faster than its killer has survived nothing."""
    _, seconds, _ = bench.alone(layout, *more)
    for _ in range(20):
        run, rank = bench.place(), bench.random.randrange(PROCESSES[layout])
        delay = bench.random.uniform(0.1, 1.0) * seconds
        try:
            run_ranks(PROCESSES[layout], resuming.train_and_die_after, plain(layout, *more), str(run), rank, delay)
        except RankFailed:
            survive(bench, run, layout, *more)
            return
    raise AssertionError("no kill hit a run in 20 attempts")


def flipped(bench: Bench) -> None:
    """C6: one bit of one file of a checkpoint."""
    checkpoint = _checkpoint(bench)
    path = bench.random.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    offset, bit = bench.random.randrange(path.stat().st_size), 1 << bench.random.randrange(8)
    with open(path, "r+b") as file:
        _flip(file, offset, bit)
        try:
            _detected(checkpoint, path.name)
        finally:
            _flip(file, offset, bit)
    assert whole(checkpoint) == STEPS


def damaged(bench: Bench) -> None:
    """C7: one file truncated, emptied, deleted, renamed, one too many, two swapped."""
    checkpoint = bench.place() / step_name(STEPS)
    shutil.copytree(_checkpoint(bench), checkpoint)
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    path, other = bench.random.sample(files, 2)
    ways: list[Callable[[], object]] = [
        lambda: os.truncate(path, bench.random.randrange(path.stat().st_size)),
        lambda: os.truncate(path, 0),
        path.unlink,
        lambda: path.rename(checkpoint / "rank-00042-000.safetensors"),
        lambda: shutil.copy(other, checkpoint / "rank-00042-000.safetensors"),
        lambda: (path.rename(checkpoint / "aside"), other.rename(path), (checkpoint / "aside").rename(other)),
    ]
    bench.random.choice(ways)()
    _detected(checkpoint, "")


def passed_over(bench: Bench) -> None:
    """C6, C7 to the end: the newest is damaged, the one before it is used, the run ends as if nothing had been."""
    run = bench.place()
    run_ranks(1, resuming.train_and_save, plain("single"), str(run))
    path = run / CHECKPOINTS / step_name(STEPS) / "rank-00000-000.safetensors"
    with open(path, "r+b") as file:
        _flip(file, bench.random.randrange(path.stat().st_size), 1)
    journal = run_ranks(1, resuming.train_and_save, plain("single"), str(run))[0]
    assert journal.lines == {STEPS: bench.alone("single")[0].lines[STEPS]}
    assert path.parent.with_name(f"{step_name(STEPS)}.damaged").is_dir()


def replaced(bench: Bench) -> None:
    """C8: a checkpoint of a step that has one already; killed at a rename or a deletion in between."""
    checkpoint = bench.place() / CHECKPOINTS / step_name(STEPS)
    shutil.copytree(_checkpoint(bench), checkpoint)
    partial = catalog.partial_folder(checkpoint.parent, STEPS)
    shutil.copytree(checkpoint, partial)
    at = bench.random.randrange(10)
    with pytest.raises(RankFailed, match="died"):
        run_ranks(1, resuming.commit_and_die, str(partial), at)
    catalog.tidy(checkpoint.parent)
    assert whole(checkpoint) == STEPS
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def full(bench: Bench) -> None:
    """C9: no room for a save. One line with the numbers; nothing half-written stays; the run goes on when there is."""
    run = bench.place()
    size = max(path.stat().st_size for path in _checkpoint(bench).iterdir())
    limit = bench.random.randrange(4096, size)
    with pytest.raises(RankFailed, match=r"checkpoint of step \d+: no space for it in .*: needs .* MiB, has .* MiB"):
        run_ranks(1, resuming.train_with_small_files, plain("single"), str(run), limit)
    assert not list((run / CHECKPOINTS).iterdir())
    survive(bench, run, "single")


def unflushed(bench: Bench) -> None:
    """C10: the disk refuses to flush a file or a folder. Not committed; one line; the run goes on afterwards."""
    run = bench.place()
    _, _, (operations,) = bench.alone("single")
    at = bench.random.randrange(sum(operation.startswith("fsync") for operation in operations))
    try:
        run_ranks(1, resuming.train_with_failing_fsync, plain("single"), str(run), at)
    except RankFailed as failure:
        assert os.strerror(errno.EIO) in str(failure)
    # Where it struck a deletion, the save before it stands, and the run has gone on.
    survive(bench, run, "single")


def ordered(bench: Bench) -> None:
    """C14, against a power cut: each file is flushed before the rename that commits it, its folder after."""
    operations = bench.alone("single")[2][0]
    commits = [number for number, line in enumerate(operations) if re.match(r"os\.rename .*\.partial$", line)]
    assert len(commits) == STEPS
    for begin, end in zip([0, *commits], commits, strict=False):
        before = operations[begin:end]
        written = {line.split(" ", 1)[1] for line in before if line.startswith("open ") and ".partial/" in line}
        flushed = {line.split(" ", 1)[1] for line in before if line.startswith("fsync ")}
        assert written
        assert written <= flushed, f"not flushed: {written - flushed}"
        parent = str(Path(operations[end].split(" ", 1)[1]).parent)
        assert operations[end + 1 : end + 3] == [f"open {parent}", f"fsync {parent}"]


def again_and_again(bench: Bench, starts: int) -> None:
    """C17: a run that is started for every single step."""
    starts = max(starts, 3)
    few = ("checkpoint.every=1", f"train.steps={starts}", "scheduler=constant")
    ((lines, descriptors),) = run_ranks(
        1, resuming.resume_often, plain("single", *few), str(bench.place()), starts, timeout=60 + 5 * starts
    )
    alone = run_ranks(1, resuming.train_and_save, plain("single", *few), str(bench.place()))[0]
    assert lines == alone.lines
    assert descriptors <= 2, f"{descriptors} files more are open"


def _checkpoint(bench: Bench) -> Path:
    """Of a run on two ranks that went to its end."""
    bench.alone("fsdp")
    return next(bench.folder.glob(f"*/{CHECKPOINTS}/{step_name(STEPS)}/rank-00001-000.safetensors")).parent


def _detected(checkpoint: Path, name: str) -> None:
    try:
        whole(checkpoint)
    except CheckpointDamaged as damage:
        assert name in str(damage)
        return
    raise AssertionError(f"{name or checkpoint}: damaged, and loaded")


def _flip(file, offset: int, bit: int) -> None:
    file.seek(offset)
    byte = file.read(1)[0]
    file.seek(offset)
    file.write(bytes([byte ^ bit]))
    file.flush()


def told_to_stop(bench: Bench) -> None:
    """P4: a signal, once or several times, to one rank. Exit code 75 on all, and the same command goes on."""
    from tests import test_checkpoint_run as runs

    place, rank = bench.place(), bench.random.randrange(2)
    sent = signal.Signals[bench.random.choice(["SIGTERM", "SIGINT", "SIGUSR1"])]
    times = 1 if sent == signal.SIGINT else bench.random.choice([1, 2, 10])
    run, after = place / "run", bench.random.choice([3, 6, 9])
    codes = run_ranks(2, runs.start, runs.overrides(run), rank, (sent,) * times, str(run), after)
    assert codes == [EXIT_STOPPED] * 2, f"{sent.name} x {times} on rank {rank}: {codes}"
    assert run_ranks(2, runs.start, runs.overrides(run)) == [0, 0]
    alone = bench.folder / "alone"
    if not alone.exists():
        assert run_ranks(2, runs.start, runs.overrides(alone)) == [0, 0]
    assert runs.told(run) == runs.told(alone)


def failing(bench: Bench) -> None:
    """P2: an exception on one rank. The status file names the rank and the error."""
    run, rank = bench.place() / "run", bench.random.randrange(2)
    where = bench.random.choice(["the loop", "the backward"])
    with pytest.raises(RankFailed):
        run_ranks(2, resuming.start_and_fail, _door("ddp", run), rank, where)
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAILED)
    assert str(status["reason"]) == f"rank {rank}: ZeroDivisionError: planted in {where}", status


def not_finite(bench: Bench) -> None:
    """P9: all ranks stop alike, and none starts again by itself."""
    run = bench.place() / "run"
    codes = run_ranks(2, resuming.door, _door("fsdp", run, "optimizer.lr=1e35", "train.steps=20"))
    assert codes == [EXIT_FAILED] * 2
    assert read_status(run)["retry"] is False


def _door(layout: str, run: Path, *more: str) -> list[str]:
    return [*plain(layout), "cluster=cpu", "logging.progress=off", f"train.run_dir={run}", *more]
