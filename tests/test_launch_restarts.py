"""A worker is killed and the job restarts: the losses are bit-identical, and no step is trained twice."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED
from launch.process import rank_processes
from tests.support.harness import run_ranks
from tests.support.parity import words
from tests.support.selection import rows
from trainer.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.manifest import read_manifest
from trainer.process.status import check_idle, read_status

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 36, 6
RANK = (1, "rank 1 was killed by SIGKILL")
LAUNCHER = (None, "the launcher was killed by SIGKILL")
SETTINGS = (
    f"checkpoint.every={EVERY}",
    "model.config.resid_pdrop=0.1",
    "logging.progress=off",
    "train.eval_samples=0",
    "train.export=false",
    "cluster.device=cpu",
)


def overrides(layout: str, *more: str) -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, *more)


def start(cwd: Path, *argv: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(argv, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def launch(cwd: Path, *more: str) -> subprocess.Popen[str]:
    return start(cwd, sys.executable, "-m", "launch", *more, "train.run_dir=run")


def kill_a_rank(job: subprocess.Popen[str], run: Path, *, rank: int | None, after: int) -> None:
    """Sends SIGKILL as soon as the checkpoint of step `after` exists.

    rank: rank to kill; None: kill the launcher of the ranks.
    """
    wait_for(job, run / CHECKPOINTS / step_name(after))
    ranks = {int(process.environ()["RANK"]): process for process in rank_processes(psutil.Process(job.pid))}
    (ranks[rank] if rank is not None else psutil.Process(ranks[0].ppid())).kill()


def wait_for(job: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def journal(run: Path) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """Returns the exact numbers of every step and the hashes of each rank's files in the last checkpoint. These files
    hold parameters, optimizer states and random generators."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines if line["kind"] == "step"]
    files = read_manifest(committed(run / CHECKPOINTS)[-1]).files
    return steps, {name: entry.sha256 for name, entry in files.items() if name.startswith("rank-")}


@functools.cache
def left_alone(layout: str, ranks: int = 2) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    with TemporaryDirectory() as folder:
        assert run_ranks(ranks, main, overrides(layout, f"train.run_dir={folder}/alone")) == [EXIT_FINISHED] * ranks
        found = journal(Path(folder, "alone"))
    assert [step for step, *_ in found[0]] == list(range(1, STEPS + 1))
    return found


# Each start repeats the imports in every process of the job. So every change only tests one kill per launcher, and a
# job of one rank for torchrun's own restart.
KILLS = [
    ("torchrun", "fsdp", 2, [LAUNCHER]),
    ("torchrun", "fsdp", 2, [RANK, LAUNCHER]),
    ("deepspeed", "zero2", 1, [(0, "a rank was killed by SIGKILL")]),
    ("deepspeed", "zero2", 2, [(0, "a rank was killed by SIGKILL")]),
]


@pytest.mark.parametrize(
    ("launcher", "layout", "ranks", "kills"),
    rows(
        KILLS, lambda launcher, _, ranks, kills: len(kills) == 1 and ranks == {"torchrun": 2, "deepspeed": 1}[launcher]
    ),
)
def test_the_job_comes_back_after_each_kill(
    launcher: str, layout: str, ranks: int, kills: list[tuple[int | None, str]], tmp_path: Path
) -> None:
    job = launch(tmp_path, f"launcher={launcher}", f"cluster.gpus_per_node={ranks}", *overrides(layout))
    for number, (rank, _) in enumerate(kills, start=1):
        kill_a_rank(job, tmp_path / "run", rank=rank, after=2 * number * EVERY)
    _, errors = job.communicate(timeout=180)
    assert job.returncode == EXIT_FINISHED, errors
    restarts = [line for line in errors.splitlines() if line.startswith("restart: ")]
    assert len(restarts) == len(kills), errors
    for line, (_, death) in zip(restarts, kills, strict=True):
        assert line.startswith(f"restart: {death}; starting again from step ")
        assert "(restart 1 of 3 from there)" in line
    assert journal(tmp_path / "run") == left_alone(layout, ranks)
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.parametrize(("layout", "ranks"), rows([("single", 1), ("ddp", 2)], lambda _, ranks: ranks == 1))
def test_torchruns_own_restart_goes_on_in_the_folder_of_the_first_start(
    layout: str, ranks: int, tmp_path: Path
) -> None:
    """The test names no run folder and forbids folders of earlier runs. A restart must still accept its own folder."""
    torchrun = ("torchrun", "--rdzv-backend=loopback", f"--nproc-per-node={ranks}", "--max-restarts=2", "-m", "trainer")
    job = start(tmp_path, *torchrun, *overrides(layout, "train.resume=never"))
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob(f"runs/*/*/{CHECKPOINTS}/{step_name(EVERY)}"))):
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.005)
    run = found[0].parent.parent
    kill_a_rank(job, run, rank=0, after=2 * EVERY)
    _, errors = job.communicate(timeout=180)
    assert job.returncode == EXIT_FINISHED, errors
    assert [path for path in run.parent.iterdir()] == [run]
    assert journal(run) == left_alone(layout, ranks)


DYING = "import sys; print('started', flush=True); sys.exit(1)"
# Reports the state "running", like rank 0, and ends at the second interrupt.
INTERRUPTED = """
import json, pathlib, signal, sys, time
note = pathlib.Path("interrupted")
signal.signal(signal.SIGINT, lambda *_: sys.exit(1) if note.exists() else note.touch())
pathlib.Path("status.json").write_text(json.dumps({"state": "running", "step": 3}))
time.sleep(60)
"""

HOLDING = """
import pathlib, time
from trainer.process.status import lock
lock(pathlib.Path("run").absolute())
pathlib.Path("held").touch()
time.sleep(60)
"""


def driver(folder: Path, *, pause: float, cap: int, child: str = DYING) -> str:
    """Returns a program that runs a job. The default job always dies before its first checkpoint."""
    return f"""
import sys
from pathlib import Path
from launch import supervise
from launch.command import Command
supervise.PAUSE_SECONDS = {pause}
job = Command(argv=(sys.executable, "-c", {child!r}), environment={{}})
sys.exit(supervise.run_job(lambda again: job, Path({str(folder)!r}), max_restarts={cap})[0])
"""


@pytest.mark.parametrize("cap", [0, 2])
def test_a_job_that_cannot_go_on_is_given_up(cap: int, tmp_path: Path) -> None:
    job = start(tmp_path, sys.executable, "-c", driver(tmp_path, pause=0.01, cap=cap))
    _, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_FAILED
    lines = errors.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["restart"] * cap + ["the run failed"], errors
    if cap:
        assert "starting again from the beginning (restart 1 of 2 from there)" in lines[0]
        assert "given up after 2 restarts in a row from the beginning (launcher.max_restarts=2)" in lines[-1]


def test_a_signal_between_two_starts_ends_at_once(tmp_path: Path) -> None:
    job = start(tmp_path, sys.executable, "-c", driver(tmp_path, pause=100, cap=3))
    assert job.stderr is not None
    line = job.stderr.readline()
    assert line.startswith("restart: exit code 1, and no rank left word why; starting again from the beginning")
    before = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (128 + signal.SIGTERM, "")
    assert time.monotonic() - before < 20


def test_a_job_that_is_interrupted_twice_is_over(tmp_path: Path) -> None:
    job = start(tmp_path, sys.executable, "-c", driver(tmp_path, pause=0.01, cap=3, child=INTERRUPTED))
    wait_for(job, tmp_path / "status.json")
    job.send_signal(signal.SIGINT)
    wait_for(job, tmp_path / "interrupted")
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_FAILED
    assert "starting again" not in errors
    assert "ended by a signal before it had saved; the same command goes on from its newest checkpoint" in errors
    status = read_status(tmp_path)
    assert (status["state"], status["step"]) == ("failed", 3)
    assert str(status["reason"]).startswith("ended by a signal")


def test_what_a_rank_has_reported_is_not_repeated(tmp_path: Path) -> None:
    status = {"state": "failed", "reason": "no space for it", "exit_code": EXIT_FAILED, "retry": False}
    child = "import json, pathlib, sys\nprint('no space for it', file=sys.stderr)\n"
    child += f"pathlib.Path('status.json').write_text({json.dumps(status)!r})\nsys.exit(1)"
    job = start(tmp_path, sys.executable, "-c", driver(tmp_path, pause=0.01, cap=3, child=child))
    _, errors = job.communicate(timeout=60)
    assert errors.splitlines() == [
        "no space for it",
        "the run failed: as reported above; it would end the same way again (exit code 1)",
    ]


def test_a_launcher_that_cannot_keep_the_errors_ends_as_the_ranks_did(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()  # prevents the creation of the folder
    child = "import sys\nfor rank in (0, 1): print(f'[rank{rank}]: lost', file=sys.stderr)\nsys.exit(1)"
    job = start(tmp_path, sys.executable, "-c", driver(tmp_path, pause=0.01, cap=0, child=child))
    _, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_FAILED
    why = "the run failed: exit code 1, and no rank left word why"
    assert [line.partition(";")[0] for line in errors.splitlines()] == ["[rank0]: lost", f"{why} (exit code 1)"]


def test_a_second_launch_in_the_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """The refusal is quick, and the second launch must not mistake the first one's status for its own."""
    run = tmp_path / "run"
    run.mkdir()
    holder = start(tmp_path, sys.executable, "-c", HOLDING)
    try:
        wait_for(holder, tmp_path / "held")
        job = launch(tmp_path, *overrides("ddp"), "cluster.gpus_per_node=2")
        _, errors = job.communicate(timeout=60)
        assert job.returncode == EXIT_BAD_CONFIG
        (line,) = errors.splitlines()
        assert f"{run}: a run is going on in it (host " in line
        assert f"pid {holder.pid}); wait for its end" in line
        assert [path.name for path in run.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    check_idle(run)


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        job = launch(tmp_path, *overrides("ddp", f"launcher.master_port={port}", "cluster.gpus_per_node=2"))
        _, errors = job.communicate(timeout=60)
    assert job.returncode == EXIT_BAD_CONFIG
    assert errors.startswith(f"launcher.master_port={port}: the ranks cannot meet there (Address already in use); ")
    assert len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
