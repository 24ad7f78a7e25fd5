"""The work of a rank in a test of whole runs: it calls the real entry point and injects a fault."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from trainer.engine import Engine


def run_trainer(arguments: list[str]) -> int:
    """Call the real entry point. Returns its exit code."""
    from trainer.__main__ import main

    return main(arguments)


def start_and_exhaust(arguments: list[str], rank: int, more_bytes: int) -> int:
    """Call the real entry point; one rank may take `more_bytes` more address space. Raises unless the run succeeds."""
    if int(os.environ["RANK"]) == rank:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes, resource.RLIM_INFINITY))
    code = run_trainer(arguments)
    assert code == 0, f"exit code {code}"
    return code


def start_and_exhaust_in_training(arguments: list[str], rank: int, more_bytes: int) -> int:
    """Like `start_and_exhaust`, but the limit applies from the first step on, after the ranks have met."""
    import trainer.run.loop

    train_step = trainer.run.loop.train_step

    def limited(*values: Any) -> Any:
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes, resource.RLIM_INFINITY))
        return train_step(*values)

    if int(os.environ["RANK"]) == rank:
        trainer.run.loop.train_step = limited
    code = run_trainer(arguments)
    assert code == 0, f"exit code {code}"
    return code


def start_and_fail(arguments: list[str], rank: int, where: str) -> int:
    """Call the real entry point; one rank raises in its third step. Raises unless the run ends with exit code 0."""
    import trainer.run.loop

    if int(os.environ["RANK"]) == rank:
        calls, at, train_step = itertools.count(), 2, trainer.run.loop.train_step

        def planted(engine: Engine, *rest: Any) -> Any:
            if next(calls) == at:
                if where == "the backward":
                    parameter = next(engine.model.parameters())
                    parameter.register_hook(lambda gradient: fail())
                else:
                    fail()
            return train_step(engine, *rest)

        def fail() -> None:
            kind = torch.OutOfMemoryError if where == "an allocation" else ZeroDivisionError
            raise kind(f"planted in {where}")

        trainer.run.loop.train_step = planted
    code = run_trainer(arguments)
    assert code == 0, f"exit code {code}"
    return code


def start_with_slow_save(arguments: list[str], step: int, seconds: float, grace: float) -> int:
    """Call the real entry point with one slow save. The process gets SIGTERM as the save begins, SIGKILL later.

    step: step whose save is slow.
    seconds: duration of the save, in seconds.
    grace: seconds from SIGTERM to SIGKILL.
    """
    fsync, files = os.fsync, itertools.count()

    def slow(descriptor: int) -> None:
        fsync(descriptor)
        if f"{step:08d}.partial" in os.readlink(f"/proc/self/fd/{descriptor}") and next(files) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            killer = threading.Timer(grace, os.kill, (os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()
            time.sleep(seconds)

    os.fsync = slow
    return run_trainer(arguments)


def start_with_jumping_clock(arguments: list[str], seed: float) -> int:
    """Call the real entry point in a process whose wall clock jumps at every reading."""
    draw, real = random.Random(seed), time.time
    time.time = lambda: real() + draw.uniform(-1e5, 1e5)
    return run_trainer(arguments)


def export_if_it_can(checkpoint: str, target: str) -> None:
    from trainer.checkpoint.__main__ import main

    with contextlib.suppress(OSError, ValueError):
        main(["export", checkpoint, target])
