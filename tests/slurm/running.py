"""A Slurm cluster for the tests, the runs launched on it, and the results read back from their folders."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main

ROOT = Path(__file__).parent.parent.parent
SCRIPT = Path(__file__).with_name("cluster.sh")
SETTINGS = Path(os.environ.get("COOKBOOK_SLURM_DIR", "/tmp/cookbook-slurm"))
# Seconds until a test gives up. On an idle machine everything is many times faster, but CI machines are busy.
PATIENCE = 240.0
# Dropout is on, so a random stream that is not restored changes the losses.
TINY = (
    "cluster=slurm",
    "cluster.device=cpu",
    "cluster.nodes=2",
    "cluster.gpus_per_node=2",
    "parallel=fsdp",
    "model=tiny_gpt2",
    "model.config.n_layer=1",
    "model.config.n_embd=64",
    "model.config.resid_pdrop=0.1",
    "data=synthetic",
    "data.seq_len=32",
    "train.micro_batch_size=2",
    "train.steps=300",
    "train.timeout_minutes=0.5",
    "train.eval_samples=0",
    "checkpoint.every=50",
)


@dataclass(frozen=True)
class Cluster:
    """A running Slurm cluster.

    tmp: a folder that all nodes see.
    """

    tmp: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "SLURM_CONF": str(SETTINGS / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(self.tmp / "extensions"),
            "HF_HUB_OFFLINE": "1",
        }

    def control(self, *words: str) -> str:
        done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run_launch(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m launch` as a subprocess."""
        return subprocess.run(
            [sys.executable, "-m", "launch", *words],
            cwd=self.tmp,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def within(self, *words: str) -> tuple[int, str, str]:
        """Launch in this process, which has loaded the libraries already; return exit code, stdout and stderr."""
        out, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
            patch.chdir(self.tmp)
            for name, value in self.environment.items():
                patch.setenv(name, value)
            code = main(words)
        return code, out.getvalue(), errors.getvalue()

    def launch(self, run_dir: Path, *words: str) -> Run:
        """Submit a run. The test fails if it is refused."""
        code, out, errors = self.within(*TINY, f"train.run_dir={run_dir}", *words)
        assert code == 0, errors
        assert f"folder     {run_dir}\n" in out
        submitted = re.search(r"^submitted  job (\d+)$", out, re.MULTILINE)
        assert submitted, out
        return Run(self, run_dir, submitted[1])

    def ask(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def jobs(self) -> str:
        """Return the ids of the waiting and running jobs."""
        return self.look("squeue", "--noheader", "--format=%i")

    def look(self, *words: str) -> str:
        """Call `ask` for a read-only command; retry if the controller closes the connection, as it does when busy."""
        for _ in range(5):
            with suppress(subprocess.CalledProcessError):
                return self.ask(*words)
            time.sleep(1)
        return self.ask(*words)

    def clear(self) -> None:
        """End all jobs, and wait until their nodes are free."""
        if self.jobs():
            self.ask("scancel", "--user=root")
        deadline = time.monotonic() + PATIENCE
        while self.jobs():
            assert time.monotonic() < deadline, self.look("squeue")
            time.sleep(0.2)


@dataclass(frozen=True)
class Run:
    cluster: Cluster
    folder: Path
    job: str

    def field(self, name: str) -> str:
        """Return a field of `scontrol show job`: JobState, BatchHost, ..."""
        shown = self.cluster.look("scontrol", "show", "job", "-o", self.job)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def end(self, *, within: float = 2 * PATIENCE) -> str:
        """Wait for the job's end and return its last state.

        On its way back to the queue a job passes through states that look final. A final state counts if the
        supervisor's status agrees, or if it lasts for two seconds.
        """
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "PREEMPTED")
        seen: list[tuple[float, str]] = []

        def over() -> bool:
            state = self.field("JobState")
            if state in running or (seen and seen[0][1] != state):
                seen.clear()
            if state not in running:
                seen.append((time.monotonic(), state))
            said = self.status()["state"] in ("finished", "failed", "stopped")
            return bool(seen) and (said or seen[-1][0] - seen[0][0] > 2.0)

        self.wait(over, "the end of the job", within=within)
        return seen[0][1]

    def wait(self, condition: Callable[[], bool], what: str, *, within: float = PATIENCE) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"waited {within:g} s for {what}\n{self.log()}"
            time.sleep(0.1)

    def reach(self, step: int, *, within: float = PATIENCE) -> None:
        """Wait until the ranks have done this step."""
        self.wait(lambda: max(self.losses(), default=0) >= step, f"step {step}", within=within)

    def warn(self) -> None:
        """Send the signal that Slurm sends to the batch process near the time limit."""
        found = subprocess.run(["pgrep", "-f", f"slurm.supervise {self.folder}$"], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[0]), signal.SIGUSR1)

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("logs/slurm-*.out")))

    def status(self) -> dict[str, object]:
        """Return the supervisor's status; before the supervisor writes one, it has no starts."""
        path = self.folder / "slurm/status.json"
        return json.loads(path.read_text()) if path.exists() else {"starts": 0, "requeues": 0, "state": None}

    def nodes(self) -> list[str]:
        """Return the nodes of the newest start."""
        found = self.status()["nodes"]
        assert isinstance(found, list)
        return found

    def trained(self) -> dict[str, object]:
        """Return the trainer's status."""
        return json.loads((self.folder / "status.json").read_text())

    def losses(self) -> dict[int, set[tuple[float, float]]]:
        """Return the logged pairs of loss and gradient norm of each step; a repeated step may have several."""
        found: dict[int, set[tuple[float, float]]] = {}
        for line in self.steps():
            found.setdefault(line["step"], set()).add((line["loss"], line["grad_norm"]))
        return found

    def steps(self) -> list[dict[str, Any]]:
        """Return the step lines of metrics.jsonl, except one that is still being written."""
        path = self.folder / "metrics.jsonl"
        texts = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(text) for text in texts if text.endswith("\n")]
        return [line for line in lines if line["kind"] == "step"]

    def model(self) -> str:
        """Return the hash of the exported model's weights."""
        return sha256((self.folder / "model/model.safetensors").read_bytes()).hexdigest()

    def ranks(self, node: str) -> list[int]:
        """Return the process ids of the ranks on a node, as this machine sees them."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                environment = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
                words = (folder / "cmdline").read_bytes() if environment else b""
            except OSError:
                continue
            ours = f"SLURM_JOB_ID={self.job}".encode(), f"SLURMD_NODENAME={node}".encode()
            rank = any(entry.startswith(b"LOCAL_RANK=") for entry in environment)
            if rank and all(entry in environment for entry in ours) and b"trainer\0" in words:
                found.append(int(folder.name))
        return sorted(found)


def same_run(run: Run, alone: Run) -> None:
    """Check that an interrupted run equals an undisturbed one bit for bit: the weights, and each step's loss and
    gradient norm."""
    assert run.losses() == alone.losses()
    assert all(len(values) == 1 for values in run.losses().values())
    assert run.model() == alone.model()


def start_cluster(tmp: Path) -> Cluster | str:
    """Return the cluster, or the reason that it cannot start. If namespaces fail, all nodes share this machine's."""
    if os.geteuid() != 0:
        return "a Slurm cluster of several nodes needs root"
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (.ci/run installs them)"
    wanted = os.environ.get("COOKBOOK_SLURM_MODE", "auto")
    reasons: list[str] = []
    for mode in ("auto", "flat") if wanted == "auto" else (wanted,):
        environment = {**os.environ, "COOKBOOK_SLURM_MODE": mode}
        done = subprocess.run(["bash", str(SCRIPT), "up"], env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return Cluster(tmp)
        reasons.append(f"{mode}: {done.stderr.strip()[-500:]}")
        subprocess.run(["bash", str(SCRIPT), "down"], capture_output=True, timeout=120)
    return f"Slurm does not start: {'; '.join(reasons)}"


def which(program: str) -> str | None:
    return shutil.which(program, path=f"/usr/sbin:/sbin:{os.environ['PATH']}")
