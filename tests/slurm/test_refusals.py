"""Requests that a real Slurm would refuse or never start are refused in one line and leave no files; jobs also run
without the launcher."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.running import ROOT, TINY, Cluster, Run

pytestmark = pytest.mark.timeout(900)
BLOCK = re.compile(r"^```bash slurm\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["cluster.slurm.partition=nope"], "cluster.slurm.partition=nope: Slurm refuses ("),
        (["cluster.nodes=99"], "cluster.nodes=99: Slurm refuses ("),
        (["cluster.device=cuda", "cluster.gpus_per_node=9", "estimate.gate=off"], "cluster.nodes=2: Slurm refuses ("),
        (["cluster.slurm.mem=4T"], "cluster.nodes=2: Slurm refuses ("),
        (["cluster.slurm.constraint=nope"], "cluster.slurm.constraint=nope: Slurm refuses ("),
        (["cluster.slurm.cpus_per_node=65"], "cluster.nodes=2: Slurm refuses ("),
        (["cluster.slurm.sbatch_args=['--nodelist=nope']"], "cluster.kind=slurm: Slurm refuses (Invalid node name"),
        (["cluster.slurm.sbatch_args=['--no-such-option']"], "cluster.kind=slurm: Slurm refuses ("),
    ],
)
def test_refused_before_submission(words: list[str], problem: str, cluster: Cluster, run_dir: Path) -> None:
    code, out, errors = cluster.within(*TINY, f"train.run_dir={run_dir}", *words)
    assert code == 2
    assert errors.startswith(problem)
    assert errors.count("\n") == 1
    assert not out
    assert not run_dir.exists()
    assert cluster.jobs() == ""


def test_a_folder_that_a_node_does_not_see(cluster: Cluster, run_dir: Path) -> None:
    if cluster.control("mode") != "ns":
        pytest.skip("nodes share all mounts")
    run_dir.mkdir()
    cluster.control("exec", "n2", "mount", "-t", "tmpfs", "tmpfs", str(run_dir))
    try:
        run = cluster.launch(run_dir, "launcher.max_restarts=0", "cluster.slurm.sbatch_args=['--nodelist=n1,n2']")
        assert run.end() == "FAILED"
        line = f"n2: train.run_dir={run_dir}: cannot be read on this node (No such file or directory); choose a folder"
        assert line in run.log()
    finally:
        cluster.control("exec", "n2", "umount", str(run_dir))


def test_the_page_s_commands(cluster: Cluster) -> None:
    """This runs the commands that need Slurm; tests/test_docs.py runs the others."""
    blocks = BLOCK.findall((ROOT / "docs/slurm.md").read_text())
    assert len(blocks) == 2
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=cluster.tmp,
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "submitted  array" in said


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_the_example_without_the_launcher(nodes: int, cluster: Cluster, run_dir: Path) -> None:
    """It stops near the time limit without reporting a failure, is requeued, and finishes."""
    ours = ("cluster=slurm", "cluster.nodes=", "cluster.slurm")
    words = [word for word in TINY if not word.startswith(ours)]
    run_dir = run_dir / str(nodes)
    options = [f"--nodes={nodes}", "--gpus-per-node=2", "--cpus-per-task=2", f"--chdir={cluster.tmp}"]
    options += [f"--output={run_dir}.out"]
    run_dir.parent.mkdir(exist_ok=True)
    submitted = cluster.ask("sbatch", "--parsable", *options, str(ROOT / "slurm/example.sbatch"), str(run_dir), *words)
    job = Run(cluster, run_dir, submitted)
    job.reach(1)
    cluster.ask("scancel", "--batch", "--signal=USR1", submitted)
    assert job.end() == "COMPLETED", Path(f"{run_dir}.out").read_text()
    assert "ChildFailedError" not in Path(f"{run_dir}.out").read_text()
    assert job.field("Restarts") == "1"
    assert [line["step"] for line in job.steps()] == list(range(1, 301))
