"""What happens to jobs on a real cluster, made to happen: each run goes on to the last bit, or ends and says why."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.running import Cluster, Run, same_run

pytestmark = pytest.mark.timeout(400)
full = pytest.mark.slurm_full


@pytest.fixture
def separate_nodes(cluster: Cluster) -> None:
    if cluster.control("mode") != "ns":
        pytest.skip("the kernel refuses network namespaces, so a node cannot be cut off or switched off as a whole")


def test_three_faults_in_one_job(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    """A rank is killed: the step is started again. The time limit comes near: saved, requeued, continued. Meanwhile
    the controller dies, and is back later."""
    run = cluster.launch(run_dir)
    run.reach(60)
    os.kill(run.ranks("n2")[1], signal.SIGKILL)
    run.wait(lambda: run.status()["starts"] == 2, "the second start", within=60)
    run.reach(120)
    cluster.control("kill-controller")
    run.warn()
    run.wait(lambda: run.status()["state"] == "requeued", "the supervisor's decision", within=60)
    saved = run.trained()["step"]
    cluster.control("start-controller")
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)
    log = run.log()
    killed, _, rest = log.partition("slurm: restarting: ")
    assert "Signal 9 (SIGKILL)" in killed, "a rank that was killed is reported"
    told = rest.partition("running: start 2")[2].partition("slurm: requeued: ")[0]
    assert "stopped    after step" in told
    assert not [word for word in ("ChildFailedError", "Traceback", "srun: error") if word in told], told
    assert f"requeued: step {saved} is saved; back to the queue" in log
    assert run.status()["requeues"] == 1
    assert run.field("Restarts") == "1"


def test_a_node_is_lost(cluster: Cluster, run_dir: Path, alone: Run, separate_nodes: None) -> None:
    """Slurm finds out, requeues the job, and it goes on elsewhere."""
    run = cluster.launch(run_dir)
    run.reach(60)
    cluster.control("power-off", "n2")
    run.wait(lambda: run.status()["requeues"] == 1, "the job on other nodes", within=120)
    assert run.end() == "COMPLETED", run.log()
    assert "n2" not in str(run.status()["nodes"])
    cluster.control("start-node", "n2")
    same_run(run, alone)


@full
@pytest.mark.parametrize("victim", ["slurm.agent", "srun"])
def test_what_starts_the_ranks_is_killed(victim: str, cluster: Cluster, alone: Run) -> None:
    run = cluster.launch(cluster.tmp / f"killed-{victim}")
    run.reach(60)
    pattern = f"^srun .*{run.folder} " if victim == "srun" else f"torch.distributed.run .*{run.folder}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)
    run.wait(lambda: run.status()["starts"] == 2, "the second start", within=90)
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)


@full
def test_the_first_node_is_lost(cluster: Cluster, run_dir: Path, alone: Run, separate_nodes: None) -> None:
    run = cluster.launch(run_dir)
    run.reach(60)
    cluster.control("power-off", "n1")
    run.wait(lambda: run.status()["requeues"] == 1, "the job on other nodes", within=120)
    assert run.end() == "COMPLETED", run.log()
    cluster.control("start-node", "n1")
    same_run(run, alone)


@full
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_is_cut_off_and_comes_back(node: str, cluster: Cluster, alone: Run, separate_nodes: None) -> None:
    """Its ranks live on for a while: the new start waits until they have let the run folder go."""
    run = cluster.launch(cluster.tmp / f"cut-{node}")
    run.reach(60)
    cluster.control("cut", node)
    run.wait(lambda: run.status()["requeues"] == 1, "the job on other nodes", within=150)
    cluster.control("heal", node)
    assert run.end(within=240) == "COMPLETED", run.log()
    same_run(run, alone)


@full
def test_a_slurmd_is_restarted(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    run = cluster.launch(run_dir)
    run.reach(20)
    cluster.control("kill-daemon", "n2")
    cluster.control("start-node", "n2")
    assert run.end() == "COMPLETED", run.log()
    same_run(run, alone)
    assert run.status()["starts"] == 1


@full
def test_a_job_that_counts_for_more_takes_the_nodes(cluster: Cluster, run_dir: Path, alone: Run) -> None:
    run = cluster.launch(run_dir)
    run.reach(60)
    other = cluster.ask("sbatch", "--parsable", "-p", "high", "-N4", "-c64", "--output=/dev/null", "--wrap=sleep 5")
    run.wait(lambda: run.status()["state"] == "requeued", "the supervisor's decision", within=60)
    saved = run.trained()["step"]
    assert run.end(within=240) == "COMPLETED", run.log()
    same_run(run, alone)
    assert f"requeued: step {saved} is saved" in run.log()
    assert [line["step"] for line in run.steps()] == list(range(1, 301)), "a step was lost and made again"
    assert Run(cluster, run_dir, other).field("JobState") == "COMPLETED"


@full
def test_a_real_time_limit(cluster: Cluster, run_dir: Path) -> None:
    """One minute for each job: saved and requeued before it, to the last step, with nothing lost."""
    words = ("cluster.slurm.time=1", "cluster.slurm.signal_seconds=25", "train.steps=600", "checkpoint.every=0")
    run = cluster.launch(run_dir, *words)
    assert run.end(within=380) == "COMPLETED", run.log()
    requeues = run.status()["requeues"]
    assert isinstance(requeues, int)
    assert requeues >= 1
    assert [line["step"] for line in run.steps()] == list(range(1, 601)), "a step was lost and made again"


@full
def test_a_job_that_always_dies_ends(cluster: Cluster, run_dir: Path) -> None:
    """Killed at each start before any checkpoint: given up after launcher.max_restarts."""
    run = cluster.launch(run_dir, "checkpoint.every=0", "train.steps=100000", "launcher.max_restarts=1")
    for start in (1, 2):
        run.wait(lambda start=start: run.status()["starts"] == start and bool(run.ranks("n1")), f"start {start}")
        os.kill(run.ranks("n1")[0], signal.SIGKILL)
    assert run.end() == "FAILED"
    assert "given up after 1 restarts in a row from the beginning" in run.log()
    assert (run.status()["state"], run.status()["starts"]) == ("failed", 2)
