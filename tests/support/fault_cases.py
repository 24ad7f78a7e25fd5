"""Faults of a run, one per case. A case injects its fault and raises AssertionError if the run does not survive it.

The journal decides. It holds for every step the bits of loss and gradient norm, and a hash of all parameters and
optimizer states. A killed run and its restart must write the same lines as an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.errors import CheckpointDamaged
from tests.support import resuming
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import words
from tests.support.resuming import Journal
from trainer.checkpoint import catalog
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.manifest import (
    check_contents,
    check_file_sizes,
    read_manifest,
)

STEPS = 6
SETTINGS = ("checkpoint.every=1", "checkpoint.keep_last=2", "model.config.resid_pdrop=0.1", "model.config.n_layer=1")
FIRST_SAVE, DELETIONS = rf"{step_name(1)}\.partial", r"\.deleted|^os\.rename .*/step-"
FLOAT32, BFLOAT16 = 1e-5, 2e-2
# C13: layout, processes, other changes, and either the tolerance of the next loss or the refusal.
OTHERWISE: list[tuple[str, int, tuple[str, ...], float | str]] = [
    ("single", 1, (), FLOAT32),
    ("fsdp", 4, (), FLOAT32),
    ("ddp", 2, ("train.gradient_accumulation_steps=2",), FLOAT32),
    ("tensor", 2, (), FLOAT32),
    ("zero2", 2, (), FLOAT32),
    ("single", 1, ("precision=bf16",), BFLOAT16),
    ("fsdp", 2, ("train.global_batch_size=4",), float("inf")),
    ("fsdp", 2, ("train.global_batch_size=6",), "train.global_batch_size=6: "),
    ("fsdp", 2, ("model.config.n_embd=32",), "model.n_embd=64, this run has model.n_embd=32"),
    ("fsdp", 2, ("train.seed=5",), "train.seed=0, this run has train.seed=5"),
    ("fsdp", 2, ("data.seq_len=16",), "data.seq_len=32, this run has data.seq_len=16"),
    ("fsdp", 2, ("optimizer=sgd",), "optimizer.name=adamw, this run has optimizer.name=sgd"),
]
PROCESSES = {"single": 1, "fsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


@dataclass(frozen=True)
class Alone:
    """An undisturbed run.

    seconds: duration of the run, in seconds.
    operations: file operations of each rank.
    """

    journal: Journal
    seconds: float
    operations: list[list[str]]
    folder: Path


@dataclass
class Bench:
    """State shared by the cases of one run of the script. The cases draw all their choices from `random`."""

    folder: Path
    random: random.Random
    _alone: dict[tuple[str, ...], Alone] = field(default_factory=dict)
    _count: int = 0

    def place(self) -> Path:
        """Make a new empty folder."""
        self._count += 1
        folder = self.folder / f"{self._count:04d}"
        folder.mkdir()
        return folder

    def alone(self, layout: str, *more: str) -> Alone:
        key = (layout, *more)
        if key not in self._alone:
            before, folder = time.monotonic(), self.place()
            ranks = run_ranks(PROCESSES[layout], resuming.list_file_operations, plain(layout, *more), str(folder))
            operations = [listed for listed, _ in ranks]
            self._alone[key] = Alone(ranks[0][1], time.monotonic() - before, operations, folder)
        return self._alone[key]


def plain(layout: str, *more: str) -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, *more)


def survive(bench: Bench, run: Path, layout: str, *more: str) -> int:
    """Restart the run in `run` and train to the end. Returns the first step trained, which must be uncommitted."""
    record = run / "committed.txt"
    known = max(map(int, record.read_text().split())) if record.exists() else 0
    newest = max((whole(path) for path in committed(run / CHECKPOINTS)), default=0)
    assert newest >= known, f"step {known} was committed, {newest} is what is left"
    journal = run_ranks(PROCESSES[layout], resuming.train_and_save, plain(layout, *more), str(run))[0]
    first = min(journal.lines, default=STEPS + 1)
    assert first == newest + 1, f"step {newest} was committed, the run went on with {first}"
    alone = bench.alone(layout, *more).journal
    assert journal.lines == {step: alone.lines[step] for step in journal.lines}, "another journal"
    assert all(path.name.startswith("step-") for path in (run / CHECKPOINTS).iterdir()), "leftovers"
    return first


def whole(checkpoint: Path) -> int:
    """Return the step of a checkpoint that is complete and undamaged. Otherwise raises CheckpointDamaged."""
    manifest = read_manifest(checkpoint)
    check_file_sizes(checkpoint, manifest)
    check_contents(checkpoint, manifest, manifest.files)
    return manifest.step


def killed_at_a_file_operation(bench: Bench, layout: str, *more: str, among: str = "") -> None:
    """C1 (one rank), C2 (one of two ranks), C5: a rank is killed at a random file operation.

    among: pattern of the operations to choose from, for C11 (deletions) and C12 (first save).
    """
    run, rank = bench.place(), bench.random.randrange(PROCESSES[layout])
    operations = bench.alone(layout, *more).operations[rank]
    at = bench.random.choice([number for number, line in enumerate(operations) if re.search(among, line)])
    with pytest.raises(RankFailed, match="died"):
        run_ranks(PROCESSES[layout], resuming.train_and_die, plain(layout, *more), str(run), rank, at)
    first = survive(bench, run, layout, *more)
    assert first == 1 or among != FIRST_SAVE, f"no checkpoint was there, and the run began with step {first}"


def killed_at_any_time(bench: Bench, layout: str, *more: str) -> None:
    """C3, C4: a rank is killed at a random time, possibly before the first checkpoint (C12).

    A run that ends before its kill does not count.
    """
    longest = bench.alone(layout, *more).seconds
    for _ in range(20):
        run, rank = bench.place(), bench.random.randrange(PROCESSES[layout])
        delay = bench.random.uniform(0.1, 1.0) * longest
        try:
            run_ranks(PROCESSES[layout], resuming.train_and_die_after, plain(layout, *more), str(run), rank, delay)
        except RankFailed:
            survive(bench, run, layout, *more)
            return
        # The machine was busier when the undisturbed run was timed.
        longest = delay
    raise AssertionError("no kill hit a run in 20 attempts")


def flipped(bench: Bench) -> None:
    """C6: one bit of one file of a checkpoint is flipped."""
    checkpoint = saved(bench)
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
    """C7: a file is truncated, emptied, deleted, renamed or added, or two files are swapped."""
    checkpoint = bench.place() / step_name(STEPS)
    shutil.copytree(saved(bench), checkpoint)
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
    """C6, C7 in a whole run: the newest checkpoint is damaged, and the run resumes from the one before it."""
    run = bench.place()
    run_ranks(1, resuming.train_and_save, plain("single"), str(run))
    path = run / CHECKPOINTS / step_name(STEPS) / "rank-00000-000.safetensors"
    with open(path, "r+b") as file:
        _flip(file, bench.random.randrange(path.stat().st_size), 1)
    journal = run_ranks(1, resuming.train_and_save, plain("single"), str(run))[0]
    assert journal.lines == {STEPS: bench.alone("single").journal.lines[STEPS]}
    assert path.parent.with_name(f"{step_name(STEPS)}.damaged").is_dir()


def replaced(bench: Bench) -> None:
    """C8: a checkpoint replaces an existing one of the same step; the process is killed at a rename or a deletion."""
    checkpoint = bench.place() / CHECKPOINTS / step_name(STEPS)
    shutil.copytree(saved(bench), checkpoint)
    partial = catalog.partial_folder(checkpoint.parent, STEPS)
    shutil.copytree(checkpoint, partial)
    at = bench.random.randrange(10)
    with pytest.raises(RankFailed, match="died"):
        run_ranks(1, resuming.commit_and_die, str(partial), at)
    catalog.tidy(checkpoint.parent)
    assert whole(checkpoint) == STEPS
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def full(bench: Bench) -> None:
    """C9: there is no space for a save.

    The error is one line with the sizes. No partial file remains, and the run resumes once there is space.
    """
    run = bench.place()
    size = max(path.stat().st_size for path in saved(bench).iterdir())
    limit = bench.random.randrange(4096, size)
    with pytest.raises(RankFailed, match=r"checkpoint of step \d+: no space for it in .*: needs .* MiB, has .* MiB"):
        run_ranks(1, resuming.train_with_small_files, plain("single"), str(run), limit)
    assert not list((run / CHECKPOINTS).iterdir())
    survive(bench, run, "single")


def unflushed(bench: Bench) -> None:
    """C10: the disk fails to flush a file or a folder.

    The checkpoint is not committed, the error is one line, and the run can resume afterwards.
    """
    run = bench.place()
    (operations,) = bench.alone("single").operations
    at = bench.random.randrange(sum(operation.startswith("fsync") for operation in operations))
    try:
        run_ranks(1, resuming.train_with_failing_fsync, plain("single"), str(run), at)
    except RankFailed as failure:
        assert os.strerror(errno.EIO) in str(failure)
    # If the fault hit a deletion, the save before it is complete and the run has continued.
    survive(bench, run, "single")


def ordered(bench: Bench) -> None:
    """C14, for power cuts: each file is flushed before the rename that commits it, and its folder after the rename."""
    operations = bench.alone("single").operations[0]
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
    """C17: a run is restarted for every single step."""
    starts = max(starts, 3)
    few = ("checkpoint.every=1", f"train.steps={starts}", "scheduler=constant")
    ((lines, descriptors),) = run_ranks(
        1, resuming.resume_often, plain("single", *few), str(bench.place()), starts, timeout=60 + 5 * starts
    )
    alone = run_ranks(1, resuming.train_and_save, plain("single", *few), str(bench.place()))[0]
    assert lines == alone.lines
    assert descriptors <= 2, f"{descriptors} files more are open"


def resumed_otherwise(bench: Bench) -> None:
    """C13: a run resumes with changed settings.

    With another layout, number of ranks, micro-batch or dtype, the losses are the same up to rounding. Another model,
    seed, data set or batch is refused in one line with both values, and the folder remains untouched.
    """
    still = ("model.config.resid_pdrop=0.0",)  # dropout masks differ between layouts
    run, alone = bench.place() / "run", bench.alone("fsdp", *still)
    shutil.copytree(alone.folder, run)
    shutil.rmtree(run / CHECKPOINTS / step_name(STEPS))
    layout, processes, change, expected = bench.random.choice(OTHERWISE)
    before = sorted(run.rglob("*"))
    try:
        journal = run_ranks(processes, resuming.train_and_save, plain(layout, *still, *change), str(run))[0]
    except RankFailed as failure:
        assert isinstance(expected, str), failure
        assert expected in str(failure), failure
        assert sorted(run.rglob("*")) == before, "a refused start has changed the folder"
        return
    assert isinstance(expected, float), f"{change}: was not refused"
    assert list(journal.losses) == [STEPS]
    ours, theirs = journal.losses[STEPS], alone.journal.losses[STEPS]
    assert abs(ours - theirs) <= expected * abs(theirs), f"{layout} {change}: {ours}, alone {theirs}"


def saved(bench: Bench) -> Path:
    """The last checkpoint of a complete run on two ranks."""
    return bench.alone("fsdp").folder / CHECKPOINTS / step_name(STEPS)


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
