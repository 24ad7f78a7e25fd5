"""All tests of this folder share one Slurm cluster. If it cannot be started, they are skipped with the reason."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.running import SCRIPT, Cluster, Run, start_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster has four nodes, n1 to n4, with eight fake GPUs each."""
    started = start_cluster(tmp_path_factory.mktemp("slurm"))
    if isinstance(started, str):
        pytest.skip(started)
    yield started
    subprocess.run(["bash", str(SCRIPT), "down"], capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def alone(cluster: Cluster) -> Run:
    """This run is never disturbed; all interrupted runs are compared with it."""
    run = cluster.launch(cluster.tmp / "alone")
    assert run.end() == "COMPLETED", run.log()
    return run


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    """End the jobs that a failed test left, since they would hold nodes that the next test needs."""
    yield
    cluster.clear()


@pytest.fixture
def run_dir(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """Return a run folder that no other test uses."""
    return cluster.tmp / request.node.name.partition("[")[0]
