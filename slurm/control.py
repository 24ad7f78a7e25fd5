"""Status and cancellation of a submitted run: `python -m launch status RUN_DIR` and `cancel RUN_DIR`.

It reads `squeue` and the run folder. It does not need `sacct`, which many clusters have disabled.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import EnvironmentProblem
from slurm.job import job_ids, read_job_status
from trainer.process.status import read_status

OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def status_lines(run_dir: Path) -> list[str]:
    """State of training, job and queue, one line each. Raises EnvironmentProblem if no run was submitted."""
    ids = _ids(run_dir)
    try:
        queue = _queue(ids[-1])
    except EnvironmentProblem as error:
        queue = f"not known: {error}"
    return [
        status_line("training", read_status(run_dir), "state", "step", "reason"),
        status_line("job", read_job_status(run_dir), "state", "starts", "requeues", "reason"),
        f"queue      {queue}",
    ]


def cancel(run_dir: Path) -> str:
    """Cancel the job of a run. Returns one line about the effect.

    Slurm sends SIGTERM: ranks save and end if the cluster's KillWait (usually 30 s) is long enough.
    """
    ids = _ids(run_dir)
    job = living_job(run_dir)
    if job is None:
        return f"job {ids[-1]} is not in the queue any more"
    run_slurm(["scancel", job])
    return f"job {job} is cancelled; the same `python -m launch` with train.run_dir={run_dir} goes on with the run"


def living_job(run_dir: Path) -> str | None:
    """The waiting or running job of this run; None if there is none."""
    ids = job_ids(run_dir)
    if not ids:
        return None
    states = run_slurm(["squeue", "--noheader", f"--jobs={ids[-1]}", "--format=%T"], unknown_is_over=True).split()
    return ids[-1] if any(state not in OVER for state in states) else None


def run_slurm(command: Sequence[str], *, unknown_is_over: bool = False) -> str:
    """Output of a Slurm program. unknown_is_over: an id that Slurm has forgotten gives empty output.

    Raises EnvironmentProblem with the first line of its error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise EnvironmentProblem(f"there is no {command[0]} on PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"{command[0]} does not answer; try again later") from None
    if done.returncode == 0:
        return done.stdout
    if unknown_is_over and "Invalid job id" in done.stderr:
        return ""
    raise EnvironmentProblem(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[0]}")


def _queue(job_id: str) -> str:
    shown = run_slurm(
        ["squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%i %T %r %N"], unknown_is_over=True
    )
    lines = [f"job {' '.join(line.split())}" for line in shown.splitlines()]
    return "\n           ".join(lines) or f"job {job_id} is over"


def _ids(run_dir: Path) -> list[str]:
    ids = job_ids(run_dir)
    if not ids:
        raise EnvironmentProblem(f"{run_dir}: no job was submitted from this folder; give the run folder of one")
    return ids


def status_line(name: str, status: Mapping[str, object], *keys: str) -> str:
    parts = [f"{key} {status[key]}" for key in keys if status.get(key) is not None]
    return f"{name:<10} {', '.join(parts).removeprefix('state ') or 'not begun'}"
