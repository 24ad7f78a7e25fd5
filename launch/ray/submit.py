"""Plan a run for a Ray cluster and supervise it, or print what would run; its status, and its cancellation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from configs.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, ConfigError
from configs.overrides import quote_value
from configs.schema import Config
from launch.command import Rendezvous, build_command
from launch.ray.cluster import ADDRESS, Cluster, bundle, resource_text, strategy_of
from launch.ray.options import check_options
from launch.ray.record import FOLDER, STATE, folder, is_driven, read_state, write_state
from launch.ray.start import Starter
from launch.supervise import keep_running
from slurm.arguments import restart_overrides
from slurm.control import status_line
from trainer.estimate.gate import check_memory
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan
from trainer.process.disks import writing
from trainer.process.status import check_idle, check_unfinished, lock, read_status, unlock
from trainer.process.stopping import STOP_FILE
from trainer.process.world import PLAN_SHOWN
from trainer.report.folder import default_run_dir, make_run_dir

COMPARE = "run them with python -m launch -m ..., then python -m launch compare FOLDER"
WAITS = True
KEEPS = f"{FOLDER}/{STATE}"
KEPT = ("OMP_NUM_THREADS",)  # variables of this process that its ranks inherit


def launch_job(config: Config, overrides: Sequence[str], *, config_dir: str | None) -> tuple[int, bool]:
    """Plan one run and supervise it to its end. Raises CookbookError before anything is started."""
    if problems := [*check_options(config)]:
        raise ConfigError(*problems)
    plan = make_plan(config, Machine(gpus=config.cluster.gpus_per_node or 0))
    print(plan.describe(), flush=True)  # before the prediction, which takes seconds
    memory = check_memory(config, plan)
    print(*memory, "", sep="\n", flush=True)
    default = default_run_dir if config.dry_run else make_run_dir
    run_dir = Path(config.train.run_dir or default(config, datetime.now())).expanduser().absolute()
    settled = config.train.run_dir is None
    config.train.run_dir = str(run_dir)
    search = None if config_dir is None else str(Path(config_dir).expanduser().absolute())
    passed_on = [word for word in overrides if not word.startswith(("dry_run=", "train.run_dir="))]
    overrides = [*passed_on, f"train.run_dir={quote_value(str(run_dir))}"]
    if config.dry_run:
        _show(config, plan, overrides, run_dir=run_dir, config_dir=search)
        return EXIT_FINISHED, False
    try:
        check_unfinished(config, run_dir)
        check_idle(run_dir)
        return _run(config, plan, overrides, run_dir=run_dir, config_dir=search)
    finally:
        if settled:
            with suppress(OSError):  # not empty: the run has begun
                run_dir.rmdir()


def _run(
    config: Config, plan: Plan, overrides: list[str], *, run_dir: Path, config_dir: str | None
) -> tuple[int, bool]:
    with Cluster(config, plan) as cluster:
        with writing(run_dir):
            folder(run_dir).mkdir(parents=True, exist_ok=True)
        lock(folder(run_dir))
        try:
            (run_dir / STOP_FILE).unlink(missing_ok=True)  # of an earlier start, which was killed before it obeyed
            print(f"ray        {cluster.address}, {cluster.wanted()}")
            print(f"folder     {run_dir}")
            print(f"status     python -m launch status {shlex.quote(str(run_dir))}")
            print(f"cancel     python -m launch cancel {shlex.quote(str(run_dir))}    (saves first)", flush=True)
            kept = {name: os.environ[name] for name in KEPT if name in os.environ}
            starter = Starter(
                cluster=cluster,
                nodes=plan.nodes,
                overrides=lambda again: restart_overrides(overrides, config.train.resume) if again else overrides,
                config_dir=config_dir,
                run_dir=run_dir,
                environment={**kept, PLAN_SHOWN: "1", **config.cluster.ray.environment},
                stuck_minutes=config.train.timeout_minutes + 2,
            )
            code = EXIT_FAILED
            try:
                code, stopped = keep_running(starter.start, run_dir, max_restarts=config.launcher.max_restarts)
                return code, stopped
            finally:
                ends = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped"}
                write_state(run_dir, ends.get(code, "failed"), starts=starter.starts)
                (run_dir / STOP_FILE).unlink(missing_ok=True)
        finally:
            unlock(folder(run_dir))


def status_lines(run_dir: Path) -> list[str]:
    """The state of the training and of Ray, one line each."""
    lines = [
        status_line("training", read_status(run_dir), "state", "step", "reason"),
        status_line("ray", read_state(run_dir), "state", "starts", "reason"),
    ]
    over = read_state(run_dir).get("state") in ("finished", "stopped", "failed")
    if not over and not is_driven(run_dir):
        lines.append("launcher   is gone; the same `python -m launch` goes on from the newest checkpoint")
    return lines


def cancel(run_dir: Path) -> str:
    """Ask the run to save and end. Returns one line about the effect."""
    if not is_driven(run_dir):
        return "the run does not run any more"
    with writing(run_dir):
        (run_dir / STOP_FILE).touch()
    return f"the run saves and ends; the same `python -m launch` with train.run_dir={run_dir} goes on with it"


def _show(config: Config, plan: Plan, overrides: Sequence[str], *, run_dir: Path, config_dir: str | None) -> None:
    """What would run on Ray's nodes."""
    address = config.cluster.ray.address or f"{ADDRESS}, else the cluster that runs on this machine, else a new one"
    each = f"{plan.nodes} x {{{resource_text(bundle(config, plan))}}}"
    print(f"ray        {address}")
    print(f"placement  {strategy_of(plan)}, {each}")
    for rank in range(plan.nodes):
        meeting = Rendezvous(address="NODE_0", port=29500, node_rank=rank)
        command = build_command(config, plan, overrides, run_dir=run_dir, rendezvous=meeting, config_dir=config_dir)
        print(f"node {rank:<5} {shlex.join(command.argv)}", flush=True)
