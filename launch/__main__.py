"""The main entry point: plan the run, show the command that starts it, start it, supervise it.

    python -m launch experiment=demo
    python -m launch model=gpt2 parallel=zero2 precision=bf16 dry_run=true
    python -m launch -m experiment=demo parallel=ddp,zero2

Everything that needs no job is checked first: a mistake costs one line, not eight processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from configs import waiting
from configs.choices import LauncherName
from configs.entry_point import EntryPoint, parse_arguments, show
from configs.errors import EXIT_FINISHED
from configs.interpolation import settle_clock
from configs.load import load_config
from configs.output import announce, delivered
from configs.schema import Config
from launch.clusters import CONTROLS, control, elsewhere
from launch.command import HOST, Command, Rendezvous, build_command
from launch.process import check_port, ranks_are_there, replace_process
from launch.supervise import run_job
from slurm.arguments import restart_overrides
from slurm.supervise import free_port
from trainer.estimate.gate import check_memory
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.answering import answered
from trainer.process.status import check_idle
from trainer.process.world import PLAN_SHOWN
from trainer.report.folder import default_run_dir, make_run_dir

DEFAULT_PORT = 29500  # between nodes, where a port that is free here need not be free on node 0
ENTRY_POINT = EntryPoint(
    program="python -m launch",
    purpose="Train a causal language model: on this machine, or on a SLURM, Kubernetes or Ray cluster.",
    examples=(
        ("python -m launch experiment=demo", "learn real text in minutes, without a GPU"),
        ("python -m launch model=gpt2 parallel=zero2 precision=bf16", "GPT-2 with ZeRO 2 on every GPU"),
        ("python -m launch model=llama3_1_8b parallel=zero3 dry_run=true", "print plan and command, start nothing"),
        ("python -m launch cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 parallel=fsdp", "submit a job"),
        ("python -m launch compare parallel=single,ddp,fsdp", "several layouts, and one page about them"),
        ("python -m launch import ds_config.json", "an experiment from the file of another trainer"),
        ("python -m launch status RUN_DIR", "how a submitted run stands; cancel RUN_DIR ends it"),
    ),
    sweeps=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code of the job, or of the first one that failed in a sweep."""
    # The clock is read once: ranks, restarts and the runs of a comparison get the same time.
    given = settle_clock(sys.argv[1:] if argv is None else argv, datetime.now())
    return answered(lambda: _answer(given))


def _answer(argv: Sequence[str]) -> int:
    if argv and argv[0] in CONTROLS:
        return control(argv)
    if argv and argv[0] == "compare":  # imported here: other commands need neither its figures nor foreign tables
        from launch.compare import compare

        return compare(argv[1:], launch=launch)
    if argv and argv[0] == "import":
        from launch.importing import main as import_main

        return import_main(argv[1:])
    arguments = parse_arguments(ENTRY_POINT, argv)
    if arguments.show is not None:
        print(show(ENTRY_POINT, arguments))
        return delivered(EXIT_FINISHED)
    if not arguments.sweep:
        return launch(arguments.overrides, config_dir=arguments.config_dir)[0]
    from launch.sweep import sweep

    return sweep(arguments, launch)


def launch(overrides: Sequence[str], *, config_dir: str | None, stay: bool = False) -> tuple[int, bool]:
    """Plan and start one run. Returns the job's exit code, and whether a signal asked to end.

    stay: keep this process even if a single plain process could replace it.
    Raises CookbookError before anything is started.
    """
    config = load_config(overrides, config_dir=config_dir)
    if (cluster := elsewhere(config.cluster.kind)) is not None:
        return cluster.launch_job(config, overrides, config_dir=config_dir)
    # The environment's world (a pod's WORLD_SIZE) is not the one that this command is about to create.
    plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
    starting = plan.nodes == 1 and not config.dry_run
    if starting and config.launcher.master_port is not None:
        check_port(config.launcher.master_port)
    if starting and config.train.run_dir is not None:
        check_idle(Path(config.train.run_dir).expanduser().absolute())
    # Before the prediction, which takes seconds.
    print(plan.describe(), flush=True)
    for line in [*check_memory(config, plan), *([] if starting else [""])]:
        print(line)
    default = make_run_dir if starting else default_run_dir
    run_dir = Path(config.train.run_dir or default(config, datetime.now()))
    commands = _commands(config, plan, overrides, config_dir=config_dir, run_dir=run_dir)
    if plan.nodes > 1:
        hosts = f", and for HOSTFILE a file with a line `ADDRESS slots={plan.gpus_per_node}` for each node"
        files = hosts if config.launcher.name is LauncherName.deepspeed else ""
        print(f"Run one line on each node, with the address of the first for NODE_0{files}:")
    print(*(command.text() for command in commands), sep="\n", flush=True)
    if not starting:
        return EXIT_FINISHED, False
    alone = config.launcher.name is LauncherName.python
    if alone and not stay:
        replace_process(_shown(commands[0]))
    starter = "python" if alone else config.launcher.name
    announce(f"{starter} starts {plan.world_size} process(es)", until=ranks_are_there)

    def command(again: bool) -> Command:
        if not again:
            return _shown(commands[0])
        restarted = restart_overrides(overrides, config.train.resume)
        return _shown(_commands(config, plan, restarted, config_dir=config_dir, run_dir=run_dir)[0])

    try:
        restarts = 0 if alone else config.launcher.max_restarts
        return run_job(command, run_dir.expanduser(), max_restarts=restarts)
    finally:
        waiting.clear()
        if config.train.run_dir is None:
            with suppress(OSError):  # not empty: the run has begun
                run_dir.rmdir()


def _shown(command: Command) -> Command:
    """The same for ranks that do not print the plan."""
    return replace(command, environment={**command.environment, PLAN_SHOWN: "1"})


def _commands(
    config: Config, plan: Plan, overrides: Sequence[str], *, config_dir: str | None, run_dir: Path
) -> list[Command]:
    """One command for each node."""
    port, address = config.launcher.master_port, "NODE_0"
    if plan.nodes == 1:
        port, address = port or free_port(), HOST
    meetings = [Rendezvous(address=address, port=port or DEFAULT_PORT, node_rank=rank) for rank in range(plan.nodes)]
    return [
        build_command(config, plan, overrides, run_dir=run_dir, rendezvous=meeting, config_dir=config_dir)
        for meeting in meetings
    ]


if __name__ == "__main__":
    sys.exit(main())
