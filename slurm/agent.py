"""Runs on every node of a job and becomes the launcher of that node's ranks. Standard library only.

srun --ntasks-per-node=1 ... python -m slurm.agent RUN_DIR ADDRESS PORT START
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import CookbookError
from slurm.arguments import Place, launcher_arguments, launcher_environment, node_arguments
from slurm.job import Job, folder, read_job
from trainer.process.stopping import QUIET_STOP
from trainer.process.world import for_children

PROGRAMS = {
    "torchrun": ["-m", "torch.distributed.run"],
    "deepspeed": ["-m", "deepspeed.launcher.runner"],
    "accelerate": ["-m", "accelerate.commands.launch"],
}


def job_arguments(job: Job, place: Place) -> list[str]:
    """Everything before `trainer`."""
    ranks, world = place.nodes * place.processes, node_arguments(job.launcher, place)
    arguments = launcher_arguments(job.launcher, world, job.launcher_args, ranks=ranks, device=job.device)
    return [*PROGRAMS.get(job.launcher, ()), *arguments]


def node_environment(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's environment: without a foreign world, and with each rank's share of this node's CPUs from Slurm.

    Ranks that stop on request end with 0: the supervisor reads status.json, and the job's log ends with its line
    instead of every launcher's report of a failure.
    """
    ours = for_children(environment)
    ours[QUIET_STOP] = "1"
    cores = len(os.sched_getaffinity(0))
    wanted = launcher_environment(job.launcher, processes=job.processes, device=job.device, cores=cores)
    return {**wanted, **ours}


def main(argv: Sequence[str]) -> int:
    """argv: run folder, address, port, number of this start. Returns only if the folder cannot be read."""
    run_dir = Path(argv[0])
    try:
        job = read_job(run_dir)
    except CookbookError as error:
        print(f"{os.environ.get('SLURMD_NODENAME')}: {error}", file=sys.stderr)
        return error.exit_code
    place = Place(
        nodes=job.nodes,
        node_rank=int(os.environ["SLURM_NODEID"]),
        processes=job.processes,
        address=argv[1],
        port=int(argv[2]),
        hostfile=str(folder(run_dir) / "hostfile"),
    )
    overrides = job.words if argv[3] == "1" else job.again
    command = [sys.executable, *job_arguments(job, place), "trainer", *overrides]
    os.execve(sys.executable, command, node_environment(job, os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
