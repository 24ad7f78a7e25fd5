"""Runs on a real Slurm cluster of several nodes, from `python -m launch` to the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from secrets import token_hex

import pytest

from tests.slurm.running import Cluster, Run

pytestmark = pytest.mark.timeout(900)
# It is random, since a run stores the diff of its working tree, which may include this file.
CANARY = f"canary-{token_hex(8)}"


def test_two_nodes_under_torchrun(alone: Run) -> None:
    log = alone.log()
    assert "slurm: running: start 1 on n1, n2" in log
    assert "world      4 = 2 node(s) x 2 process(es) on cpu" in log
    assert log.endswith("slurm: finished: the run is finished\n")
    assert sorted(alone.losses()) == list(range(1, 301))
    assert (alone.status()["state"], alone.status()["starts"]) == ("finished", 1)
    assert alone.trained()["state"] == "finished"
    if alone.cluster.control("mode") == "ns":
        assert alone.trained()["host"] == "n1", "rank 0 is on the first node"
        assert "preflight  4 ranks on 2 node(s) agree" in log


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("accelerate", marks=pytest.mark.nightly)])
def test_two_nodes_under_other_launchers(launcher: str, cluster: Cluster, alone: Run) -> None:
    run = cluster.launch(cluster.tmp / launcher, f"launcher={launcher}")
    assert run.end() == "COMPLETED", run.log()
    assert run.losses() == alone.losses()
    assert run.model() == alone.model()


def test_status_and_cancel(cluster: Cluster, run_dir: Path) -> None:
    """scancel reaches every rank: the ranks save, the job ends, and it is not requeued."""
    run = cluster.launch(run_dir, "train.steps=100000", "checkpoint.every=0")
    run.reach(3)
    shown = cluster.run_launch("status", str(run_dir)).stdout.splitlines()
    assert shown[0].startswith("training   running, step")
    assert shown[1].startswith("job        running, starts 1, requeues 0")
    assert shown[2].startswith(f"queue      job {run.job} RUNNING")
    again = cluster.run_launch(
        *["cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=2", "parallel=ddp"], f"train.run_dir={run_dir}"
    )
    assert again.returncode == 2
    assert again.stderr.startswith(f"train.run_dir={run_dir}: job {run.job} of this run is in the queue;")
    done = cluster.run_launch("cancel", str(run_dir))
    assert done.stdout.startswith(f"job {run.job} is cancelled; the same `python -m launch`")
    assert run.end() == "CANCELLED"
    run.wait(lambda: run.trained()["state"] == "stopped", "the ranks' last word")
    assert list((run_dir / "checkpoints").glob("step-*"))
    assert cluster.jobs() == ""
    assert cluster.run_launch("cancel", str(run_dir)).stdout == f"job {run.job} is not in the queue any more\n"


def test_gpus_are_asked_for_and_given(cluster: Cluster, run_dir: Path) -> None:
    """The job runs a user's batch script, which gets the run folder and the interpreter as arguments."""
    script = cluster.tmp / "own.sbatch"
    script.write_text('#!/bin/bash\nsrun bash -c \'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"\' >"$1/seen"\n')
    for request, kind in (("gpus_per_node", "fake"), ("gres", "null")):
        run = cluster.launch(
            run_dir / request,
            "cluster.device=cuda",
            "estimate.gate=off",
            f"cluster.slurm.script={script}",
            f"cluster.slurm.gpu_request={request}",
            f"cluster.slurm.gpu_type={kind}",
        )
        assert run.end() == "COMPLETED", run.log()
        seen = (run.folder / "seen").read_text().split()
        assert len({*seen[::2]}) == 2, "two nodes"
        assert seen[1::2] == ["0,1", "0,1"]


def test_setup_lines_run_and_secrets_stay_in_the_environment(cluster: Cluster, run_dir: Path) -> None:
    marker = cluster.tmp / "from setup"
    done = cluster.run_launch(
        *("cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=1", "parallel=single", "model=tiny_gpt2"),
        *("data=synthetic", "train.steps=2", "logging=wandb", "logging.options.mode=offline"),
        f"train.run_dir={run_dir}",
        f"cluster.slurm.setup=['printenv WANDB_API_KEY >/dev/null && touch \"{marker}\"']",
        WANDB_API_KEY=CANARY * 3,
        HF_TOKEN=CANARY,
    )
    assert done.returncode == 0, done.stderr
    job = Run(cluster, run_dir, (run_dir / "slurm/jobs.txt").read_text().strip())
    assert job.end() == "COMPLETED", job.log()
    assert marker.exists()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in cluster.ask("scontrol", "show", "job", "-o", job.job)
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.nightly
def test_jobs_of_an_array_follow_each_other(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    """The first job is asked to stop near its limit, the second finishes the run, and the third has nothing to do."""
    run = cluster.launch(run_dir, "cluster.slurm.array=1-3%1")
    run.reach(1)
    run.warn()
    run.wait(lambda: cluster.jobs() == "", "the end of the array")
    assert run.losses() == alone.losses()
    assert run.model() == alone.model()
    logs = [(run_dir / f"logs/slurm-{run.job}_{number}.out").read_text() for number in (1, 2, 3)]
    assert "the next job of the array goes on" in logs[0]
    assert "running: start 2" in logs[1]
    assert logs[2] == "slurm: finished: the run is finished\n"


def test_a_sweep_is_an_array_with_a_folder_per_point(cluster: Cluster, run_dir: Path) -> None:
    words = ["cluster=slurm", "cluster.device=cpu", "cluster.gpus_per_node=1", "parallel=single", "model=tiny_gpt2"]
    more = ["data=synthetic", "train.steps=2", "optimizer.lr=1e35,1e-4", f"train.run_dir={run_dir}"]
    done = cluster.run_launch(
        "-m", *words, *more, "cluster.slurm.array=%1", "launcher=python", "launcher.max_restarts=0"
    )
    assert done.returncode == 0, done.stderr
    array, _, number = (run_dir / "0/slurm/jobs.txt").read_text().strip().partition("_")
    assert number == "0"
    job = Run(cluster, run_dir, array)
    job.wait(lambda: cluster.jobs() == "", "the end of the array")
    states = [json.loads((run_dir / f"{point}/status.json").read_text())["state"] for point in range(2)]
    assert states == ["failed", "finished"]
    rates = [(run_dir / f"{point}/config.yaml").read_text().split("lr: ")[1].split()[0] for point in range(2)]
    assert [float(rate) for rate in rates] == [1e35, 1e-4]
    assert all((run_dir / f"{point}/logs/slurm-{job.job}_{point}.out").exists() for point in range(2))
