"""`cluster=ray` on a real Ray cluster of several nodes on this machine: runs, stops, a dead node and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED
from launch.__main__ import main
from launch.command import Rendezvous
from launch.ray import node, start
from slurm.supervise import free_port
from trainer.checkpoint.catalog import CHECKPOINTS, step_name
from trainer.run.restarts import read_standing

RAY = ["cluster=ray", "cluster.device=cpu", "cluster.gpus_per_node=1", "parallel=ddp"]
STEPS = 24
RUN = (
    *(*RAY, "cluster.nodes=2", "data=synthetic", "data.seq_len=32", f"train.steps={STEPS}", "train.eval_every=0"),
    *("train.export=false", "checkpoint.every=2", "launcher.preflight=false", "logging.progress=off"),
)
SMALL: dict[str, Any] = {"object_store_memory": 80 * 2**20}
# Otherwise each node starts a worker per CPU before it has work.
LAZY = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": LAZY, **SMALL}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1, **SMALL)
    yield made
    made.shutdown()


def when(run_dir: Path, step: int, do: Callable[[], None]) -> threading.Thread:
    """Call `do` in a thread once the checkpoint of the step exists. It is not called if the run fails earlier."""
    checkpoint = run_dir / CHECKPOINTS / step_name(step)

    def watch() -> None:
        deadline = time.monotonic() + 240
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if checkpoint.exists():
            do()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def journal(run_dir: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"}


def test_what_the_cluster_refuses(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = [*RUN, f"cluster.ray.address={cluster.address}", f"train.run_dir={run_dir}"]
    assert main([*words, "cluster.device=cuda"]) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.splitlines() == [
        "cluster.nodes=2: the run needs 2 nodes with 1 CPU, 1 GPU, and the nodes of this Ray cluster have: 1 CPU, 0"
        " GPU; 1 CPU, 0 GPU; ask for less (cluster.nodes, cluster.gpus_per_node, cluster.ray.cpus_per_node), add nodes,"
        " or set cluster.ray.autoscaling=true where the cluster adds them itself"
    ]
    assert not run_dir.exists()
    more = ["cluster.nodes=3", "cluster.ray.autoscaling=true", "cluster.ray.start_minutes=0.01"]
    assert main([*words, *more]) == EXIT_BAD_CONFIG
    shown = capsys.readouterr()
    assert "ray: waiting for 3 nodes with 1 CPU\n" in shown.out
    assert shown.err.startswith("cluster.ray.start_minutes=0.01: Ray has not had 3 nodes with 1 CPU free in that time;")
    # Only this process has the module, as if the project were not installed on the nodes.
    monkeypatch.setitem(sys.modules, "not_there", ModuleType("not_there"))
    missing = type("Node", (node.Node,), {"__module__": "not_there"})
    monkeypatch.setattr(sys.modules["not_there"], "Node", missing, raising=False)
    monkeypatch.setattr(start, "Node", missing)
    assert main(words) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err == (
        "cluster=ray: this project cannot be imported on the nodes (No module named 'not_there'); install it there with"
        " the same version, pip install '.[ray]'\n"
    )


def test_a_run_is_asked_to_stop(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    words = [*RUN, f"cluster.ray.address={cluster.address}", f"train.run_dir={run_dir}"]
    telling = when(run_dir, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(words) == EXIT_STOPPED
    telling.join()
    shown = capfd.readouterr()
    assert f"ray        {cluster.address}, 2 nodes with 1 CPU\n" in shown.out
    assert "world      2 = 2 node(s) x 1 process(es) on cpu" in shown.out
    saved = read_standing(run_dir)
    assert 2 <= saved.step < STEPS and str(saved.status["reason"]).endswith(": SIGTERM"), saved
    assert main(["status", str(run_dir)]) == EXIT_FINISHED
    assert capfd.readouterr().out.splitlines() == [
        f"training   stopped, step {saved.step}, reason {saved.status['reason']}",
        "ray        stopped, starts 1",
    ]
    assert main(["cancel", str(run_dir)]) == EXIT_FINISHED
    assert capfd.readouterr().out == "the run does not run any more\n"


def raylet(made: Any) -> psutil.Process:
    return psutil.Process(made.all_processes["raylet"][0].process.pid)


@pytest.mark.nightly
def test_a_node_dies(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All processes of the node die with it, as when a machine fails. Another node replaces it."""
    cluster.add_node(num_cpus=1, **SMALL)
    words = [*RUN, f"cluster.ray.address={cluster.address}"]
    assert main([*words, f"train.run_dir={tmp_path}/alone"]) == EXIT_FINISHED
    run_dir = tmp_path / "run"

    def kill() -> None:
        below = {each: raylet(each).children(recursive=True) for each in cluster.worker_nodes}
        dying = next(each for each in below if any("RANK" in process.environ() for process in below[each]))
        cluster.remove_node(dying, allow_graceful=False)
        for process in below[dying]:
            process.kill()

    killing = when(run_dir, 4, kill)
    assert main([*words, f"train.run_dir={run_dir}"]) == EXIT_FINISHED
    killing.join()
    shown = capfd.readouterr()
    assert "was lost" in shown.err and "starting again from step" in shown.err, shown.err
    assert "ray: start 2 on" in shown.out
    assert journal(run_dir) == journal(tmp_path / "alone") and len(journal(run_dir)) == STEPS


@pytest.mark.nightly
def test_a_launcher_is_killed(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its ranks save and stop. Nobody asked for a stop, so the run starts again."""
    run_dir = tmp_path / "run"

    def kill() -> None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if "/torchrun " in words and str(run_dir) in words:
                    process.kill()
                    return

    killing = when(run_dir, 4, kill)
    assert main([*RUN, f"cluster.ray.address={cluster.address}", f"train.run_dir={run_dir}"]) == EXIT_FINISHED
    killing.join()
    shown = capfd.readouterr()
    assert "was killed by SIGKILL; starting again from step" in shown.err, shown.err
    assert "ray: start 2 on" in shown.out and list(journal(run_dir)) == list(range(1, STEPS + 1))


@pytest.mark.nightly
def test_a_run_is_cancelled_and_goes_on(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    words = [*RUN, f"cluster.ray.address={cluster.address}", f"train.run_dir={run_dir}"]
    # A separate process asks for the stop, as a user would; this one would lose its lock on closing the file.
    telling = when(run_dir, 2, lambda: assert_signalled(run_dir))
    assert main(words) == EXIT_STOPPED
    telling.join()
    assert main(words) == EXIT_FINISHED
    assert list(journal(run_dir)) == list(range(1, STEPS + 1))


def assert_signalled(run_dir: Path) -> None:
    words = [sys.executable, "-m", "launch", "cancel", str(run_dir)]
    assert subprocess.run(words, capture_output=True, text=True).stdout.startswith("the run saves and ends; ")


def test_a_cluster_of_this_machine(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The cluster is started with the run, has one node, and ends with the run."""
    words = ["cluster.ray.address=local", "cluster.nodes=2", f"train.run_dir={tmp_path}/run"]
    assert main([*RAY, *words]) == EXIT_BAD_CONFIG
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("cluster.nodes=2: the run needs 2 nodes with 1 CPU, and the nodes of this Ray cluster have:")


def test_what_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "cluster=ray",
        "cluster.device=auto",
        "cluster.ray.address=head",
        "cluster.ray.resources={GPU: 1, tpu: 0, slot: 0.00001}",
        "cluster.ray.environment={RANK: '1', a-b: c}",
        "launcher=deepspeed",
        "launcher.master_port=2000",
    ]
    assert main(words) == EXIT_BAD_CONFIG
    assert [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "cluster.ray.address=head",
        "cluster.ray.resources={GPU",
        "cluster.ray.resources={tpu",
        "cluster.ray.resources={slot",
        "cluster.ray.environment={RANK",
        "cluster.ray.environment={a-b",
        "cluster.device=auto",
        "cluster.gpus_per_node=null",
        "launcher.name=deepspeed",
        "launcher.master_port=2000",
    ]


def test_an_amount_that_ray_cannot_divide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [*RAY, f"train.run_dir={tmp_path}/run", "cluster.ray.resources={TPU: 1.5, slot: 1.5}"]
    assert main(words) == EXIT_BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cluster.ray.resources={TPU: 1.5}: Ray refuses it (The number of requested 'TPU' was set to")


def test_an_address_where_nothing_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*RAY, f"train.run_dir={tmp_path}/run"]
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(words) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith(f"RAY_ADDRESS={address}: no Ray cluster answers there (Connection refuse")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert main(words) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith(
        "RAY_ADDRESS=ray://head:10001: the program that looks after the run needs"
    )
    monkeypatch.setattr("launch.ray.cluster.installed", lambda _name: None)
    assert main(words) == EXIT_BAD_CONFIG
    assert capsys.readouterr().err.startswith("cluster=ray: ray is not installed; pip install")


def test_a_dry_run_needs_no_ray(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["cluster=ray", "cluster.nodes=2", "cluster.gpus_per_node=8", "parallel=fsdp", "dry_run=true"]
    words += [f"train.run_dir={tmp_path}/run", r"cluster.ray.resources={accelerator_type\:H100: 0.5}"]
    assert main(words) == EXIT_FINISHED
    shown = capsys.readouterr().out
    assert "placement  STRICT_SPREAD, 2 x {8 CPU, 8 GPU, 0.5 accelerator_type:H100}\n" in shown
    assert "node 1     torchrun --nnodes=2 --node-rank=1 --master-addr=NODE_0" in shown
    assert not (tmp_path / "run").exists()


def test_a_folder_that_a_node_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(node, "SHARED_SECONDS", 0.0)
    part = node.Part(
        overrides=[*RAY, f"train.run_dir={tmp_path}"],
        config_dir=None,
        run_dir=str(tmp_path),
        token="1",
        root=str(tmp_path),
        environment={},
        rendezvous=Rendezvous(port=1),
    )
    (line,) = node.Node().start(part)
    assert line.startswith(f"train.run_dir={tmp_path}: node ") and "does not see what was written there" in line
