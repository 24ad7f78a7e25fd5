"""Faults injected into jobs on a real cluster: each run continues bit for bit, or ends and reports the reason."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.running import Cluster, Run, same_run

pytestmark = pytest.mark.timeout(1200)
full = pytest.mark.nightly


@pytest.fixture
def separate_nodes(cluster: Cluster) -> None:
    if cluster.control("mode") != "ns":
        pytest.skip("the kernel refuses network namespaces, so a node cannot be cut off or switched off as a whole")


def test_four_faults_in_one_job(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    """A rank is killed, and the job step is started again. The time limit comes near, and the job is saved, requeued
    and continued; meanwhile the controller dies and comes back. A node dies and is marked down, and the job is requeued
    again.
    """
    run = cluster.launch(run_dir)
    run.reach(60)
    os.kill(run.ranks(run.nodes()[1])[1], signal.SIGKILL)
    run.wait(lambda: run.status()["starts"] == 2, "the second start")
    run.reach(120)
    cluster.control("kill-controller")
    run.warn()
    run.wait(lambda: run.status()["state"] == "requeued", "the supervisor's decision")
    saved = run.trained()["step"]
    cluster.control("start-controller")
    lost = ""
    if cluster.control("mode") == "ns":
        run.reach(180)
        lost = run.nodes()[1]
        cluster.control("power-off", lost)
        cluster.ask("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
        run.wait(lambda: run.status()["requeues"] == 2, "the job on other nodes")
    assert run.end() == "COMPLETED", run.log()
    if lost:
        assert lost not in run.nodes()
        cluster.control("start-node", lost)
    same_run(run, alone)
    log = run.log()
    killed, _, rest = log.partition("slurm: restarting: ")
    assert "Signal 9 (SIGKILL)" in killed, "a rank that was killed is reported"
    output = rest.partition("running: start 2")[2].partition("slurm: requeued: ")[0]
    assert "stopped    after step" in output
    assert not [word for word in ("ChildFailedError", "Traceback", "srun: error") if word in output], output
    assert f"requeued: step {saved} is saved; back to the queue" in log
    assert run.status()["requeues"] == (2 if lost else 1)
    assert run.field("Restarts") == str(run.status()["requeues"])


@full
@pytest.mark.parametrize("place", [0, 1])
def test_a_node_is_lost(place: int, cluster: Cluster, alone: Run, separate_nodes: None) -> None:
    """Slurm detects the loss and requeues the job, which continues on other nodes, even if the supervisor was on it."""
    run = cluster.launch(cluster.tmp / f"lost-{place}")
    run.reach(60)
    node = run.nodes()[place]
    cluster.control("power-off", node)
    run.wait(lambda: run.status()["requeues"] == 1, "the job on other nodes")
    assert run.end() == "COMPLETED", run.log()
    assert node not in run.nodes()
    cluster.control("start-node", node)
    same_run(run, alone)


@full
@pytest.mark.parametrize("victim", ["slurm.agent", "srun"])
def test_what_starts_the_ranks_is_killed(victim: str, cluster: Cluster, alone: Run) -> None:
    run = cluster.launch(cluster.tmp / f"killed-{victim}")
    run.reach(60)
    pattern = f"^srun .*{run.folder} " if victim == "srun" else f"torch.distributed.run .*{run.folder}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    run.wait(lambda: run.status()["starts"] == 2, "the second start")
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)


@full
@pytest.mark.parametrize("place", [0, 1])
def test_a_node_is_cut_off_and_comes_back(place: int, cluster: Cluster, alone: Run, separate_nodes: None) -> None:
    """Its ranks keep running for a while, and the new start waits until they release the run folder."""
    run = cluster.launch(cluster.tmp / f"cut-{place}")
    run.reach(60)
    node = run.nodes()[place]
    cluster.control("cut", node)
    run.wait(lambda: run.status()["requeues"] == 1, "the job on other nodes")
    cluster.control("heal", node)
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)


@full
def test_ddp_goes_on_to_the_last_bit_too(cluster: Cluster, run_dir: Path) -> None:
    """Its buckets are built again at every start, and determine the order in which gradients are added."""
    alone = cluster.launch(run_dir / "alone", "parallel=ddp")
    assert alone.end() == "COMPLETED", alone.log()
    run = cluster.launch(run_dir / "killed", "parallel=ddp")
    run.reach(60)
    os.kill(run.ranks(run.nodes()[1])[1], signal.SIGKILL)
    assert run.end() == "COMPLETED", run.log()
    assert run.status()["starts"] == 2
    same_run(run, alone)


@full
def test_a_slurmd_is_restarted(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    run = cluster.launch(run_dir)
    run.reach(20)
    node = run.nodes()[1]
    cluster.control("kill-daemon", node)
    cluster.control("start-node", node)
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)
    assert run.status()["starts"] == 1


@full
def test_a_job_that_counts_for_more_takes_the_nodes(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    run = cluster.launch(run_dir)
    run.reach(60)
    other = cluster.ask("sbatch", "--parsable", "-p", "high", "-N4", "-c64", "--output=/dev/null", "--wrap=sleep 5")
    run.wait(lambda: run.status()["state"] == "requeued", "the supervisor's decision")
    saved = run.trained()["step"]
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)
    assert f"requeued: step {saved} is saved" in run.log()
    assert [line["step"] for line in run.steps()] == list(range(1, 301)), "a step was lost and made again"
    assert Run(cluster, run_dir, other).field("JobState") == "COMPLETED"


@full
def test_a_real_time_limit(cluster: Cluster, run_dir: Path) -> None:
    """The job is saved and requeued before the limit and loses no step. Then a user asks it to stop, and it ends with
    one line."""
    words = ("cluster.slurm.time=2", "cluster.slurm.signal_seconds=30", "train.steps=100000", "checkpoint.every=0")
    run = cluster.launch(run_dir, *words)
    run.wait(lambda: run.status()["state"] == "requeued", "the time limit")
    saved = int(str(run.trained()["step"]))
    run.reach(saved + 5)
    (run_dir / "STOP").touch()
    assert run.end() == "FAILED", "Slurm's word for the exit code 75"
    assert (run.status()["state"], run.status()["requeues"]) == ("stopped", 1)
    last = run.trained()["step"]
    assert [line["step"] for line in run.steps()] == list(range(1, int(str(last)) + 1)), "a step was made again"
    said = run.log().splitlines()[-1]
    assert said.startswith("slurm: stopped: ")
    assert f"; step {last} is saved; goes on with: python -m launch cluster=slurm " in said


@full
def test_a_job_that_was_requeued_often_enough_ends(cluster: Cluster, run_dir: Path) -> None:
    """Slurm counts every requeue, whether the supervisor, a user or a lost node caused it."""
    run = cluster.launch(run_dir, "cluster.slurm.max_requeues=1", "train.steps=100000", "checkpoint.every=0")
    run.reach(1)
    run.warn()
    run.wait(lambda: run.status()["requeues"] == 1, "the job back from the queue")
    saved = max(run.losses())
    run.reach(saved + 1)
    cluster.ask("scontrol", "requeue", run.job)
    run.wait(lambda: run.status()["requeues"] == 2, "the cap")
    assert run.end() == "FAILED"
    last = run.log().splitlines()[-1]
    assert last.startswith("slurm: failed: the job was requeued 2 times (cluster.slurm.max_requeues=1); step ")
    assert " is saved; goes on with: python -m launch cluster=slurm " in last
    assert run.status()["starts"] == 2, "the third start was turned away before any rank"


@full
def test_a_job_that_always_dies_ends(cluster: Cluster, run_dir: Path) -> None:
    """The job is killed at each start before any checkpoint, and is given up after launcher.max_restarts."""
    run = cluster.launch(run_dir, "checkpoint.every=0", "train.steps=100000", "launcher.max_restarts=1")
    for start in (1, 2):
        run.wait(lambda start=start: run.status()["starts"] == start, f"start {start}")
        run.wait(lambda: len(run.ranks(run.nodes()[0])) == 2, "the ranks")
        os.kill(run.ranks(run.nodes()[0])[0], signal.SIGKILL)
    assert run.end() == "FAILED"
    assert "given up after 1 restarts in a row from the beginning" in run.log()
    assert (run.status()["state"], run.status()["starts"]) == ("failed", 2)
