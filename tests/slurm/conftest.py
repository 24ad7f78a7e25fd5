"""One Slurm for all tests of this folder. Where it cannot be brought up they skip themselves and say why."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.running import SCRIPT, Cluster, Run, start_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes, n1 to n4, with eight fake GPUs each."""
    started = start_cluster(tmp_path_factory.mktemp("slurm"))
    if isinstance(started, str):
        pytest.skip(started)
    yield started
    subprocess.run(["bash", str(SCRIPT), "down"], capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def alone(cluster: Cluster) -> Run:
    """The run that all interrupted ones are compared with: nothing disturbs it."""
    run = cluster.launch(cluster.tmp / "alone")
    assert run.end() == "COMPLETED", run.log()
    return run


@pytest.fixture(autouse=True)
def no_job_is_left(cluster: Cluster) -> Iterator[None]:
    """A job that a failed test leaves would hold the nodes that the next one counts on."""
    yield
    cluster.clear()


@pytest.fixture
def run_dir(cluster: Cluster, request: pytest.FixtureRequest) -> Path:
    """Of a run that no other test meets."""
    return cluster.tmp / request.node.name.partition("[")[0]
