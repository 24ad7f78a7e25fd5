"""The door for people: plan the run, show the command that starts it, start it, stay in charge of it.

    python -m launch experiment=demo
    python -m launch model=gpt2 parallel=zero2 precision=bf16 dry_run=true
    python -m launch -m experiment=demo parallel=ddp,zero2

All that can be checked without the job is checked first: a mistake costs a line, not eight processes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from configs.choices import ClusterKind, LauncherName
from configs.door import Arguments, Door, parse_arguments, show, turn_away
from configs.errors import EXIT_FINISHED, ConfigError, CookbookError
from configs.interpolation import settle_clock
from configs.load import expand_sweep, load_config
from configs.output import delivered, guard_output
from configs.schema import Config
from launch.command import HOST, Command, Rendezvous, build_command
from launch.compare import compare
from launch.jobs import CONTROLS, control, is_array, launch_array, launch_job
from launch.process import check_port, replace_process
from launch.supervise import run_job
from slurm.supervise import free_port
from trainer.estimate.gate import check_memory
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.disks import told_anywhere
from trainer.process.status import check_idle
from trainer.report.folder import default_run_dir, make_run_dir

DEFAULT_PORT = 29500  # between nodes, where a port that is free here says nothing about node 0
DOOR = Door(
    program="python -m launch",
    purpose="Train a causal language model: on this machine's GPUs or CPU, or on a SLURM cluster.",
    examples=(
        ("python -m launch experiment=demo", "learn real text in minutes, without a GPU"),
        ("python -m launch model=gpt2 parallel=zero2 precision=bf16", "GPT-2 with ZeRO 2 on every GPU"),
        ("python -m launch model=llama3_1_8b parallel=zero3 dry_run=true", "print plan and command, start nothing"),
        ("python -m launch cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 parallel=fsdp", "submit a job"),
        ("python -m launch compare parallel=single,ddp,fsdp", "several layouts, and one page about them"),
        ("python -m launch status RUN_DIR", "how a submitted run stands; cancel RUN_DIR ends it"),
    ),
    sweeps=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say. Returns the exit code of the job, or of the first that failed in a sweep."""
    guard_output()
    # Read once: ranks, restarts and the runs of a comparison get the same time.
    words = settle_clock(sys.argv[1:] if argv is None else argv, datetime.now())
    try:
        if words and words[0] in CONTROLS:
            return control(words)
        if words and words[0] == "compare":
            return compare(words[1:], launch=launch)
        arguments = parse_arguments(DOOR, words)
        if arguments.show is not None:
            print(show(DOOR, arguments))
            return delivered(EXIT_FINISHED)
        if not arguments.sweep:
            return launch(arguments.overrides, config_dir=arguments.config_dir)[0]
        return sweep(arguments)
    except CookbookError as error:
        return turn_away(error)
    except OSError as error:
        if (told := told_anywhere(error)) is None:
            raise
        return turn_away(told)


def sweep(arguments: Arguments) -> int:
    """One run after another; a failure does not stop the others, a signal does. Returns the first failure's code."""
    runs = expand_sweep(arguments.overrides)
    cluster = load_config(runs[0], config_dir=arguments.config_dir).cluster
    if is_array(cluster):
        return launch_array(runs, config_dir=arguments.config_dir)
    check_folders(runs)
    codes: list[int] = []
    for number, overrides in enumerate(runs, 1):
        print(f"\n== run {number} of {len(runs)}: {shlex.join(overrides)}", flush=True)
        try:
            code, told = launch(overrides, config_dir=arguments.config_dir, stay=True)
        except CookbookError as error:
            code, told = turn_away(error), False
        codes.append(code)
        if told:
            break
    what = "jobs submitted" if cluster.kind is ClusterKind.slurm else "runs finished"
    print(f"\n== {codes.count(EXIT_FINISHED)} of {len(runs)} {what}")
    return next((code for code in codes if code != EXIT_FINISHED), EXIT_FINISHED)


def check_folders(runs: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError where two runs of a sweep would share a folder: the second would go on with the first."""
    named = [word for words in runs for word in words if word.startswith("train.run_dir=")]
    shared = next((word for word in named if named.count(word) > 1), None)
    if shared is not None:
        raise ConfigError(
            f"{shared}: {named.count(shared)} runs of the sweep would share this folder; leave it out, and each gets"
            " its own; on SLURM, cluster.slurm.array=%4 makes a folder for each in it"
        )


def launch(overrides: Sequence[str], *, config_dir: str | None, stay: bool = False) -> tuple[int, bool]:
    """Plan and start one run. Returns the job's exit code, and whether a signal asked to end.

    stay: keep this process even where the run is one plain process that could take its place.
    Raises CookbookError before anything is started.
    """
    config = load_config(overrides, config_dir=config_dir)
    if config.cluster.kind is ClusterKind.slurm:
        return launch_job(config, overrides, config_dir=config_dir), False
    # A world that surrounds this door (a pod's WORLD_SIZE) is not the one it is about to make.
    plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
    for line in check_memory(config, plan):
        print(line)
    starting = plan.nodes == 1 and not config.dry_run
    if starting and config.launcher.master_port is not None:
        check_port(config.launcher.master_port)
    default = make_run_dir if starting else default_run_dir
    run_dir = Path(config.train.run_dir or default(config, datetime.now()))
    if starting:
        check_idle(run_dir.expanduser().absolute())

    commands = _commands(config, plan, overrides, config_dir=config_dir, run_dir=run_dir)
    if not starting:  # else rank 0 prints the plan
        print(plan.describe(), end="\n\n")
    if plan.nodes > 1:
        hosts = f", and for HOSTFILE a file with a line `ADDRESS slots={plan.gpus_per_node}` for each node"
        files = hosts if config.launcher.name is LauncherName.deepspeed else ""
        print(f"Run one line on each node, with the address of the first for NODE_0{files}:")
    print(*(command.text() for command in commands), sep="\n", flush=True)
    if not starting:
        return EXIT_FINISHED, False
    alone = config.launcher.name is LauncherName.python
    if alone and not stay:
        replace_process(commands[0])

    def command(again: bool) -> Command:
        if not again:
            return commands[0]
        # A run that was to be new is a run to go on with by now.
        words = [
            word for word in overrides if not (config.train.resume == "never" and word.startswith("train.resume="))
        ]
        words += ["train.resume=auto"] * (config.train.resume == "never")
        return _commands(config, plan, words, config_dir=config_dir, run_dir=run_dir)[0]

    try:
        restarts = 0 if alone else config.launcher.max_restarts
        return run_job(command, run_dir.expanduser(), max_restarts=restarts)
    finally:
        if config.train.run_dir is None:
            with suppress(OSError):  # not empty: the run has begun
                run_dir.rmdir()


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
