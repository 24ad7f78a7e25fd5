"""What a rank does in a test of checkpoints: train, save, resume, and keep a journal of every bit that matters."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.load import load_config
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.progress import identity
from trainer.data.build import build_data
from trainer.engine import Engine, build_engine
from trainer.machine import find_machine
from trainer.model import build_hf_config
from trainer.optimizer import lr_at
from trainer.plan import Plan, make_plan
from trainer.runtime import Runtime, join
from trainer.step import train_step
from trainer.stopping import StopRequests

DROPOUT = ["model=tiny_gpt2", "model.config.n_embd=64", "model.config.vocab_size=131", "model.config.resid_pdrop=0.1"]


@dataclass
class Journal:
    """Per step: loss and gradient norm, their bits, and a hash of parameters and optimizer states after it."""

    losses: dict[int, float]
    grad_norms: dict[int, float]
    lines: dict[int, str]


def train_and_save(overrides: list[str], folder: str, *, upto: int | None = None) -> Journal:
    """Train in `folder`, from its newest checkpoint if there is one, to step `upto` (the end, if None)."""
    config = load_config(overrides)
    plan = make_plan(config, find_machine())
    with join(plan, timeout_minutes=1) as runtime:
        return _train(config, plan, runtime, Path(folder), upto or config.train.steps)


def resume_each(overrides: list[str], folders: list[str], steps: int) -> list[Journal]:
    """For each run folder: build the engine anew, resume, train `steps` more. Saves nothing."""
    config = load_config([*overrides, "checkpoint.every=0", "checkpoint.final=false"])
    plan = make_plan(config, find_machine())
    with join(plan, timeout_minutes=1) as runtime:
        return [_train(config, plan, runtime, Path(folder), steps, further=True) for folder in folders]


def train_and_die(overrides: list[str], folder: str, rank: int, at: int) -> Journal:
    """As `train_and_save`, but SIGKILL this process at its `at`-th operation on a file below `folder`, on this rank."""
    if int(os.environ["RANK"]) == rank:
        kill_at(folder, at)
    return train_and_save(overrides, folder)


def count_file_operations(overrides: list[str], folder: str) -> int:
    """How many places there are for `train_and_die` on this rank."""
    operations = kill_at(folder, None)
    train_and_save(overrides, folder)
    return len(operations)


def kill_at(folder: str, at: int | None) -> list[str]:
    """Python tells of every open, mkdir, rename, remove and rmdir before it happens; fsync is told of here. Returns the
    list in which they are noted."""
    seen: list[str] = []

    def note(event: str, path: object) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if str(path).startswith(folder):
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{event} {path}")

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            note(event, arguments[0])

    fsync = os.fsync

    def told_fsync(descriptor: int) -> None:
        note("fsync", descriptor)
        fsync(descriptor)

    os.fsync = told_fsync
    sys.addaudithook(audit)
    return seen


def _train(config, plan: Plan, runtime: Runtime, folder: Path, upto: int, *, further: bool = False) -> Journal:
    hf_config = build_hf_config(config.model)
    data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=hf_config.vocab_size)
    torch.manual_seed(config.train.seed + runtime.rank)
    keeper = Keeper(
        config,
        plan,
        runtime,
        folder,
        identity=identity(config, hf_config, data),
        tokenizer=data.tokenizer,
        stop=StopRequests(None),
    )
    found = keeper.find()
    engine = build_engine(config, plan, runtime)
    keeper.restore(engine)
    # What a killed process leaves: each checkpoint of whose commit it knew.
    keeper.report_to(lambda saved: _append(folder / "committed.txt", str(saved.step)) if runtime.is_main else None)
    first = found.step if found else 0
    size = plan.batch.global_batch_size
    steps = data.steps(found.samples // size if found else 0)
    journal = Journal({}, {}, {})
    for step in range(first, first + upto if further else upto):
        result = train_step(engine, next(steps), plan, runtime, lr_at(config, step))
        assert result.report is not None
        journal.losses[step + 1], journal.grad_norms[step + 1] = result.loss, result.report.grad_norm
        journal.lines[step + 1] = f"{bits(result.loss)} {bits(result.report.grad_norm)} {state_hash(engine, runtime)}"
        keeper.after_step(step + 1, engine, samples=(step + 1) * size, report=dict)
    engine.close()
    return journal


def _append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def bits(value: float) -> str:
    return struct.pack("<d", value).hex()


def state_hash(engine: Engine, runtime: Runtime) -> str:
    """Of all parameters and optimizer states, wherever they are. The same on every rank. A collective."""
    mine = {
        key: hashlib.sha256(t.cpu().contiguous().numpy().tobytes()).hexdigest()
        for key, t in engine.state()
        if t is not None
    }
    everyone = {key: digest for part in runtime.gather(mine) for key, digest in part.items()}
    return hashlib.sha256(repr(sorted(everyone.items())).encode()).hexdigest()
