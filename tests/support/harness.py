"""Runs several ranks in one test, forked from a server that has already imported torch and transformers.

`run_ranks(2, function, *args)` calls `function(*args)` in two processes that see the environment torchrun would
give them, and returns their results by rank. A rank that raises fails the test with its own traceback; ranks that
hang are killed and named.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from configs.load import load_config
from configs.schema import Config
from slurm.supervise import ephemeral_ports

F = TypeVar("F", bound=Callable[..., Any])
PORTS = 24
Overrides = Config | list[str]
PRELOADED = [
    "trainer",
    "torch",
    "torch.distributed",
    "transformers",
    "accelerate",
    "trainer.engine.torch",
    "pytest",
    "tests.support.cases",
    "tests.support.preload_deepspeed",
    "tests.support.preload_models",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def composes(function: F) -> F:
    """Decorate a rank function: the test composes its first argument, overrides, and each rank gets the `Config`.

    Composing on each rank takes a quarter of a short run's time. Entry points do so, and have tests of their own.
    """
    vars(function)["composes"] = True
    return function


def composed(overrides: Overrides) -> Config:
    return overrides if isinstance(overrides, Config) else load_config(overrides)


class RankFailed(AssertionError):
    """One or more ranks raised, hung or died."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Run `function(*args)` on each rank. Returns the results by rank.

    function: must be defined at the top level of a module.
    timeout: seconds.
    """
    if vars(function).get("composes"):
        overrides, *rest = args
        args = (composed(overrides), *rest)
    with TemporaryDirectory() as folder, reserved_ports() as port:
        ranks = [
            _context.Process(target=_rank, args=(rank, world_size, port, folder, function, args))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        _wait(ranks, timeout)
        return _results(ranks, Path(folder))


def fork(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start a process of the server that runs `function(*args)`."""
    process = _context.Process(target=function, args=args)
    process.start()
    return process


@contextmanager
def reserved_ports() -> Iterator[int]:
    """The first of `PORTS` consecutive ports that no other test and no outgoing connection takes meanwhile.

    The port before them stays bound until the block ends, which keeps the other processes of the tests away.
    """
    ephemeral = ephemeral_ports()
    starts = [
        port
        for port in range(10_000, 65_000 - PORTS, PORTS + 1)
        if port not in ephemeral and port + PORTS not in ephemeral
    ]
    for guard in random.sample(starts, k=len(starts)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            held.enter_context(socket.socket()).bind(("127.0.0.1", guard))
            for port in range(guard + 1, guard + 1 + PORTS):
                with socket.socket() as listener:
                    listener.bind(("127.0.0.1", port))
            keep = held.pop_all()
            break
    else:
        raise AssertionError("no ports are free on this machine")
    with keep:
        yield guard + 1


def _rank(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("default")
    try:
        outcome: tuple[bool, Any] = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder) / f"{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without the interpreter's shutdown: threads of a process group whose peer failed may never join.
    os._exit(0 if outcome[0] else 1)


def _wait(ranks: Sequence[BaseProcess], timeout: float) -> None:
    """Wait until all have ended, one has failed (the others get 5 seconds to fail too), or the time is up."""
    deadline = time.monotonic() + timeout
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.01)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
            rank.join()


def _results(ranks: Sequence[BaseProcess], folder: Path) -> list[Any]:
    results, failures = [], []
    for number, rank in enumerate(ranks):
        file = folder / str(number)
        if not file.exists():
            failures.append(f"rank {number}: hung or died without a result (exit code {rank.exitcode})")
            continue
        succeeded, value = pickle.loads(file.read_bytes())
        results.append(value)
        if not succeeded:
            failures.append(f"rank {number}:\n{value}")
    if failures:
        raise RankFailed("\n".join(failures))
    return results
