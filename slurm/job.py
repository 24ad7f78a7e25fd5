"""Files that a submission leaves for the job, and the job's memory between starts. Standard library only.

Files are replaced atomically: a reader sees either the old content or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import EnvironmentProblem
from trainer.process.files import read_json, replace_text

FOLDER = "slurm"  # in the run folder
JOB, STATUS, MEMORY, JOB_IDS = "job.json", "status.json", "memory.json", "jobs.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """words: overrides for `python -m trainer`.
    again: overrides of later starts, which continue the run.
    python: interpreter of the ranks.
    srun: further options.
    chain: an array of jobs, none of which requeues itself.
    stuck_minutes: how long a dead previous attempt may still hold the run folder.
    goes_on: command that continues the run after its job has ended.
    steps, epochs: total length of the training; one of them is 0."""

    words: list[str]
    again: list[str]
    launcher: str
    launcher_args: list[str]
    device: str
    nodes: int
    processes: int
    python: str
    srun: list[str]
    chain: bool
    max_restarts: int
    max_requeues: int
    start_minutes: float
    stuck_minutes: float
    goes_on: str
    steps: int = 0
    epochs: float = 0.0


@dataclass(kw_only=True, slots=True)
class Memory:
    """in_vain, step: see `trainer.run.restarts.Attempts`.
    stops_in_vain: number of consecutive jobs that were stopped without a checkpoint newer than `stopped_at`.
    starts: number of starts of the ranks, over all jobs."""

    in_vain: int = 0
    step: int = 0
    stops_in_vain: int = 0
    stopped_at: int = 0
    starts: int = 0


def folder(run_dir: Path) -> Path:
    return run_dir / FOLDER


def write_job(run_dir: Path, job: Job) -> None:
    replace_text(folder(run_dir) / JOB, json.dumps(asdict(job), indent=1) + "\n")


def read_job(run_dir: Path) -> Job:
    """Raises EnvironmentProblem if this node does not see the folder."""
    try:
        return Job(**json.loads((folder(run_dir) / JOB).read_text()))
    except OSError as error:
        raise EnvironmentProblem(
            f"train.run_dir={run_dir}: cannot be read on this node ({error.strerror}); choose a folder on a file system"
            " that all nodes share"
        ) from None


def write_memory(run_dir: Path, memory: Memory) -> None:
    replace_text(folder(run_dir) / MEMORY, json.dumps(asdict(memory)) + "\n")


def read_memory(run_dir: Path) -> Memory:
    try:
        return Memory(**read_json(folder(run_dir) / MEMORY))
    except TypeError:
        return Memory()


def write_status(run_dir: Path, state: str, **more: object) -> None:
    """state: running, restarting, stopping, requeued, finished, stopped or failed."""
    content = {"state": state, **more, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    replace_text(folder(run_dir) / STATUS, json.dumps(content, indent=1) + "\n")


def read_job_status(run_dir: Path) -> Mapping[str, object]:
    return read_json(folder(run_dir) / STATUS)


def job_ids(run_dir: Path) -> list[str]:
    """Ids of all submissions of this folder, the latest last."""
    try:
        return (folder(run_dir) / JOB_IDS).read_text().split()
    except OSError:
        return []
