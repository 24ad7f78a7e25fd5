"""`python -m launch` for SLURM: submit a run or a sweep; `status_lines` and `cancel` for a job.

python -m launch cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 ...
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from configs.choices import ClusterKind
from configs.errors import EXIT_FINISHED
from configs.load import load_config
from configs.schema import Cluster, Config
from slurm.control import cancel as cancel
from slurm.control import status_lines as status_lines
from slurm.job import FOLDER
from slurm.submit import SweepPoint, check, check_sweep, command, script_additions, script_text, submit, submit_sweep
from trainer.estimate.gate import check_memory
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan
from trainer.report.folder import default_run_dir

COMPARE = (
    "submit them with python -m launch -m ... cluster.slurm.array=%4 train.run_dir=FOLDER, then python -m launch"
    " compare FOLDER"
)
WAITS = False
KEEPS = FOLDER


def launch_job(config: Config, overrides: Sequence[str], *, config_dir: str | None) -> tuple[int, bool]:
    """Plan one run and submit it. Raises CookbookError before anything is submitted or written."""
    plan = plan_job(config)
    memory = check_memory(config, plan)
    run_dir = Path(config.train.run_dir or default_run_dir(config, datetime.now())).expanduser().absolute()
    if config.dry_run:
        check(config, run_dir)
        print(plan.describe(), *memory, "", sep="\n")
        _show_script(config, command(config, plan, run_dir))
        return EXIT_FINISHED, False
    job_id = submit(config, plan, overrides, config_dir=config_dir, run_dir=run_dir, root=Path.cwd())
    folder, log = shlex.quote(str(run_dir)), run_dir / "logs" / f"slurm-{log_id(config, job_id)}.out"
    print(plan.describe(), *memory, "", sep="\n")
    print(f"submitted  job {job_id}")
    print(f"folder     {run_dir}")
    print(f"follow     tail -F {shlex.quote(str(log))}")
    print(f"status     python -m launch status {folder}")
    print(f"stop       touch {shlex.quote(str(run_dir / 'STOP'))}    (saves first)")
    print(f"cancel     python -m launch cancel {folder}", flush=True)
    return EXIT_FINISHED, False


def launch_array(points: Sequence[Sequence[str]], *, config_dir: str | None) -> int:
    """Plan every point of a sweep and submit them as one array. Raises CookbookError before anything is submitted."""
    planned: list[SweepPoint] = []
    for number, overrides in enumerate(points):
        config = load_config(overrides, config_dir=config_dir)
        plan = plan_job(config)
        memory = check_memory(config, plan)
        if config.dry_run or memory:
            shown = [plan.describe()] if config.dry_run else []
            print(f"== point {number}: {shlex.join(overrides)}", *shown, *memory, "", sep="\n")
        planned.append(SweepPoint(config=config, plan=plan, overrides=overrides))
    first = planned[0].config
    sweep_dir = Path(first.train.run_dir or default_run_dir(first, datetime.now())).expanduser().absolute()
    if first.dry_run:
        command = check_sweep(planned, sweep_dir)
        _show_script(first, command)
        return EXIT_FINISHED
    job_id = submit_sweep(planned, config_dir=config_dir, sweep_dir=sweep_dir, root=Path.cwd())
    for number, overrides in enumerate(points):
        print(f"{sweep_dir / str(number)}: {shlex.join(overrides)}")
    print(f"submitted  array {job_id}, {len(points)} elements")
    print(f"status     python -m launch status {shlex.quote(str(sweep_dir / '0'))}")
    print(f"cancel     scancel {job_id}", flush=True)
    return EXIT_FINISHED


def _show_script(config: Config, command: Sequence[str]) -> None:
    print(shlex.join(command), "", script_text(config), sep="\n", end="")
    if lines := script_additions(config):
        print("", *lines, sep="\n")


def is_array(cluster: Cluster) -> bool:
    """Whether a sweep whose first point has this cluster becomes one array of Slurm."""
    return cluster.kind is ClusterKind.slurm and cluster.slurm.array is not None


def plan_job(config: Config) -> Plan:
    """The plan for the cluster's nodes, independent of this machine."""
    return make_plan(config, Machine(gpus=config.cluster.gpus_per_node or 0))


def log_id(config: Config, job_id: str) -> str:
    """The expansion of %j or %A_%a in the log's name; for a chain, of the first job."""
    return f"{job_id}_{config.cluster.slurm.array.partition('-')[0]}" if config.cluster.slurm.array else job_id
