"""On every node of a job: becomes the launcher of that node's ranks. Standard library only.

srun --ntasks-per-node=1 ... python -m slurm.agent RUN_DIR ADDRESS PORT START
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.errors import CookbookError
from slurm.job import Job, folder, read_job
from slurm.words import Place, accelerate_words, deepspeed_words, torchrun_words
from trainer.process.stopping import QUIET_STOP
from trainer.process.world import for_children


def launcher_words(job: Job, place: Place) -> list[str]:
    """Everything before `trainer`."""
    quiet = ["--log_level=critical", "--no_local_rank"]
    plain = ["--mixed_precision=no", "--dynamo_backend=no"]
    several = ["--multi_gpu"] if place.nodes * place.processes > 1 else ["--cpu"] if job.device == "cpu" else []
    match job.launcher:
        case "torchrun":
            return ["-m", "torch.distributed.run", *torchrun_words(place), *job.launcher_args, "-m"]
        case "deepspeed":
            return ["-m", "deepspeed.launcher.runner", *deepspeed_words(place), *quiet, *job.launcher_args, "--module"]
        case "accelerate":
            words = [*several, *accelerate_words(place), *plain, *job.launcher_args]
            return ["-m", "accelerate.commands.launch", *words, "--module"]
        case _:
            return [*job.launcher_args, "-m"]


def node_environment(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """The launcher's: without a foreign world, and with each rank's share of the CPUs that Slurm gives to this node.

    Ranks that stop because they were told to end with 0: the supervisor reads status.json, and the job's log ends with
    its line in place of every launcher's report of a failure.
    """
    ours = for_children(environment)
    ours[QUIET_STOP] = "1"
    if job.processes > 1:
        cpus = len(os.sched_getaffinity(0))
        ours.setdefault("OMP_NUM_THREADS", str(max(1, cpus // job.processes) if job.device == "cuda" else 1))
    if job.device == "cpu" and job.launcher == "deepspeed":
        ours.setdefault("DS_ACCELERATOR", "cpu")
    return ours


def main(argv: Sequence[str]) -> int:
    """argv: run folder, address, port, number of this start. Returns only where the folder cannot be read."""
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
    words = job.words if argv[3] == "1" else job.again
    command = [sys.executable, *launcher_words(job, place), "trainer", *words]
    os.execve(sys.executable, command, node_environment(job, os.environ))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
