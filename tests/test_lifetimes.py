"""Whole runs on one node lose their launcher: they listen locally, import no user files, and save before they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launch.process import rank_processes
from tests.support.parity import words
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_of
from trainer.process.status import check_idle, read_status

BIN = Path(sys.executable).parent
NIGHTLY = pytest.mark.nightly
LOCAL = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
ENDLESS = (
    "checkpoint.every=5",
    "logging.progress=off",
    "train.eval_samples=0",
    "train.export=false",
    "cluster.device=cpu",
    "train.run_dir=run",
)


@dataclass(frozen=True)
class Lost:
    """A run that has lost a process.

    victim: process id of the lost process.
    listening: (address, command line) of each listening socket during the run.
    left: child processes that outlived the run and were killed by the test.
    """

    run: Path
    victim: int
    listening: list[tuple[str, str]]
    left: list[psutil.Process]


@contextmanager
def started(folder: Path, *argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{BIN}{os.pathsep}{environment['PATH']}", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(argv, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    tree: list[psutil.Process] = []
    try:
        yield job
    finally:
        tree += psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
        for process in tree:
            process.kill()
        job.kill()
        with job:
            pass


def lose(folder: Path, number: signal.Signals, *argv: str | Path) -> Lost:
    """Starts a run, waits for its first checkpoint, and sends the signal to the started process."""
    run = folder / "run"
    with started(folder, *argv) as job:
        deadline = time.monotonic() + 200
        while not committed(run / CHECKPOINTS):
            assert job.poll() is None, job.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        tree = psutil.Process(job.pid).children(recursive=True)
        listening = [
            (connection.laddr.ip, " ".join(process.cmdline()[:6]))
            for process in (psutil.Process(job.pid), *tree)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(rank_processes(psutil.Process(job.pid))) == 2
        job.send_signal(number)
        job.wait(60)
        left = psutil.wait_procs(tree, timeout=100)[1]
        for process in left:
            process.kill()
        return Lost(run=run, victim=job.pid, listening=listening, left=left)


# The working directory is a user's folder with its own `configs`, `trainer.py` and `launch.py`.
@pytest.fixture(
    scope="module",
    params=[("torchrun", "ddp"), ("deepspeed", "pipeline"), pytest.param(("accelerate", "fsdp"), marks=NIGHTLY)],
    ids=["ddp", "pipeline", "fsdp"],
)
def launched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lost:
    launcher, layout = request.param
    folder = tmp_path_factory.mktemp(layout)
    (folder / "configs").mkdir()
    for name in ("configs/__init__.py", "trainer.py", "launch.py", "torch.py"):
        (folder / name).write_text("raise SystemExit('the working directory was imported')\n")
    command = (BIN / "cookbook", "launch", f"launcher={launcher}", "cluster.gpus_per_node=2")
    settings = words("gpt2", layout, "fp32", 100_000, *ENDLESS)
    return lose(folder, signal.SIGKILL, *command, *settings)


def test_ranks_end_with_launch_and_have_saved(launched: Lost) -> None:
    assert not launched.left
    status = read_status(launched.run)
    assert status["state"] == "stopped"
    assert str(status["reason"]).endswith(f": its launcher (pid {launched.victim}) is gone")  # the first to notice
    assert step_of(committed(launched.run / CHECKPOINTS)[-1]) == status["step"]
    check_idle(launched.run)


def test_a_run_on_one_node_is_reached_from_this_machine_only(launched: Lost) -> None:
    assert len(launched.listening) >= 3  # the store and each rank
    assert {address for address, _ in launched.listening} <= LOCAL, launched.listening


def test_ranks_of_torchrun_notice_that_it_is_gone(tmp_path: Path) -> None:
    """SIGUSR1 asks a run to stop, but torchrun does not handle it and dies."""
    command = ("torchrun", "--rdzv-backend=loopback", "--nproc-per-node=2", "-m", "trainer")
    lost = lose(tmp_path, signal.SIGUSR1, *command, *words("gpt2", "ddp", "fp32", 100_000, *ENDLESS))
    assert not lost.left
    status = read_status(lost.run)
    assert status["state"] == "stopped"
    assert str(status["reason"]).endswith(f": its launcher (pid {lost.victim}) is gone")
