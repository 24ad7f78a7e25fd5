"""The work of a rank in a test of checkpoints: it trains, saves, resumes, and keeps a journal of the exact bits."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import resource
import signal
import struct
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.schema import Config
from tests.support.harness import Overrides, composed, composes
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.progress import identity
from trainer.data.build import build_data
from trainer.engine import Engine, build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.optim.build import lr_at
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, dropout_stream, join_world
from trainer.process.stopping import StopRequests
from trainer.run.step import train_step

DROPOUT = ["model=tiny_gpt2", "model.config.n_embd=64", "model.config.vocab_size=131", "model.config.resid_pdrop=0.1"]


@dataclass
class Journal:
    """Results of each step, by step number.

    losses: loss.
    grad_norms: gradient norm.
    lines: bits of loss and gradient norm, the loss scale, and a hash of parameters and optimizer states after the step.
    """

    losses: dict[int, float]
    grad_norms: dict[int, float]
    lines: dict[int, str]


def saving(config: Config, every: int) -> Config:
    return replace(config, checkpoint=replace(config.checkpoint, every=every, final=False))


@composes
def train_and_save(overrides: Overrides, folder: str, *, upto: int | None = None) -> Journal:
    """Train in `folder` to step `upto` (default: the end), from its newest checkpoint if there is one."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        return _train(config, plan, runtime, Path(folder), upto or config.train.steps)


@composes
def resume_each(overrides: Overrides, folders: list[str], steps: int) -> list[Journal]:
    """For each run folder, build a new engine, resume, and train `steps` more. Saves nothing."""
    config = saving(composed(overrides), every=0)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        return [_train(config, plan, runtime, Path(folder), steps, further=True) for folder in folders]


@composes
def train_then_resume_each(overrides: Overrides, folder: str, others: list[str], saved: int) -> list[Journal]:
    """Train to the end with one checkpoint, at step `saved`; then resume from it with a new engine.

    others: run folders to resume as well, each with a new engine.

    Returns the journals in this order.
    """
    whole = saving(composed(overrides), every=saved)
    assert saved < whole.train.steps < 2 * saved
    config = saving(composed(overrides), every=0)
    plan = make_plan(config, find_machine())
    left = config.train.steps - saved
    with join_world(plan, timeout_minutes=2) as runtime:
        alone = _train(whole, plan, runtime, Path(folder), config.train.steps)
        return [alone, *(_train(config, plan, runtime, Path(f), left, further=True) for f in (folder, *others))]


@composes
def train_float16_then_resume(overrides: Overrides, folder: str, saved: int) -> list[Journal]:
    from tests.support.deepspeed_cases import allow_float16

    allow_float16()
    return train_then_resume_each(overrides, folder, [], saved)


@composes
def train_and_die(overrides: Overrides, folder: str, rank: int, at: int) -> Journal:
    """Like `train_and_save`, but SIGKILL this rank at its `at`-th operation on a file below `folder`."""
    if int(os.environ["RANK"]) == rank:
        kill_at(folder, at)
    return train_and_save(overrides, folder)


@composes
def count_file_operations(overrides: Overrides, folder: str) -> int:
    """The number of file operations at which `train_and_die` can kill this rank."""
    operations = kill_at(folder, None)
    train_and_save(overrides, folder)
    return len(operations)


@composes
def list_file_operations(overrides: Overrides, folder: str) -> tuple[list[str], Journal]:
    """The file operations at which `train_and_die` can kill this rank, and the journal of the undisturbed run."""
    operations = kill_at(folder, None)
    return operations, train_and_save(overrides, folder)


@composes
def train_and_die_after(overrides: Overrides, folder: str, rank: int, seconds: float) -> Journal:
    """Like `train_and_save`, but SIGKILL this rank after `seconds`."""
    if int(os.environ["RANK"]) == rank:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train_and_save(overrides, folder)


def commit_and_die(partial: str, at: int) -> None:
    """Commit a complete folder; SIGKILL at the `at`-th operation or at the end."""
    from trainer.checkpoint.catalog import commit

    kill_at(str(Path(partial).parent), at)
    commit(Path(partial))
    os.kill(os.getpid(), signal.SIGKILL)


@composes
def train_with_small_files(overrides: Overrides, folder: str, largest_file: int) -> Journal:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    try:
        return train_and_save(overrides, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@composes
def train_with_failing_fsync(overrides: Overrides, folder: str, at: int) -> Journal:
    """Like `train_and_save`, but the `at`-th fsync in `folder` fails."""
    fsync, calls = os.fsync, itertools.count()

    def failing(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(folder) and next(calls) == at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    os.fsync = failing
    return train_and_save(overrides, folder)


@composes
def resume_often(overrides: Overrides, folder: str, starts: int) -> tuple[dict[int, str], int]:
    """Start, train one step and save, `starts` times in this process.

    Returns the journal's lines, and the number of open files at the end minus that after the second start.
    """
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    lines: dict[int, str] = {}
    opened: list[int] = []
    with join_world(plan, timeout_minutes=1) as runtime:
        for _ in range(starts):
            lines |= _train(config, plan, runtime, Path(folder), 1, further=True).lines
            opened.append(len(os.listdir("/proc/self/fd")))
    return lines, opened[-1] - opened[1]


def kill_at(folder: str, at: int | None) -> list[str]:
    """Record file operations below `folder`, and SIGKILL this process at number `at` (None: never).

    Python's audit hook reports every open, mkdir, rename, remove and rmdir in advance; fsync is patched to be reported.
    Returns the list of operations, which grows with each of them.
    """
    seen: list[str] = []

    def note(event: str, path: object, below: object = -1) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif isinstance(below, int) and below >= 0:  # deleting a folder reports paths relative to it
            path = f"{os.readlink(f'/proc/self/fd/{below}')}/{path}"
        if str(path).startswith(folder):
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{event} {path}")

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename"):
            note(event, arguments[0])
        elif event in ("os.remove", "os.rmdir"):
            note(event, *arguments[:2])

    fsync = os.fsync

    def noted_fsync(descriptor: int) -> None:
        note("fsync", descriptor)
        fsync(descriptor)

    os.fsync = noted_fsync
    sys.addaudithook(audit)
    return seen


def _train(config, plan: Plan, runtime: Runtime, folder: Path, upto: int, *, further: bool = False) -> Journal:
    hf_config = build_hf_config(config.model)
    data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=hf_config.vocab_size)
    torch.manual_seed(config.train.seed + dropout_stream(plan, runtime.rank))
    manager = CheckpointManager(
        config,
        plan,
        runtime,
        folder,
        identity=identity(config, hf_config, data),
        tokenizer=data.tokenizer,
        stop=StopRequests(None),
    )
    found = manager.find()
    engine = build_engine(config, plan, runtime)
    manager.restore(engine)
    # Lists each checkpoint whose commit was reported to the process, for the case that it is killed.
    manager.report_to(lambda saved: _append(folder / "committed.txt", str(saved.step)) if runtime.is_main else None)
    first = found.step if found else 0
    size = plan.batch.global_batch_size
    steps = data.steps(found.samples // size if found else 0)
    journal = Journal({}, {}, {})
    for step in range(first, first + upto if further else upto):
        result = train_step(engine, next(steps), plan, runtime, lr_at(config, step))
        assert result.report is not None
        journal.losses[step + 1], journal.grad_norms[step + 1] = result.loss, result.report.grad_norm
        scale, state = result.report.loss_scale, state_hash(engine, runtime)
        journal.lines[step + 1] = f"{bits(result.loss)} {bits(result.report.grad_norm)} {scale} {state}"
        manager.after_step(step + 1, engine, samples=(step + 1) * size, report=dict)
    engine.close()
    return journal


def _append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def bits(value: float) -> str:
    return struct.pack("<d", value).hex()


def state_hash(engine: Engine, runtime: Runtime) -> str:
    """Hash all parameters and optimizer states of all ranks. Returns the same hash on every rank. A collective."""
    mine = {
        key: hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest()
        for key, t in engine.state()
        if t is not None
    }
    everyone = {key: digest for part in runtime.gather(mine) for key, digest in part.items()}
    return hashlib.sha256(repr(sorted(everyone.items())).encode()).hexdigest()
