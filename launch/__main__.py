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
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from configs.door import Arguments, Door, parse_arguments, show, turn_away
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_STOPPED, CookbookError
from configs.load import expand_sweep, load_config
from configs.schema import Config, LauncherName
from launch.command import Command, Rendezvous, build_command
from launch.process import free_port, replace_process, run_command
from trainer.machine import find_machine
from trainer.memory.gate import check_memory
from trainer.plan import Plan, make_plan
from trainer.report.folder import default_run_dir
from trainer.status import read_status

DEFAULT_PORT = 29500  # between nodes, where a port that is free here says nothing about node 0
DOOR = Door(
    program="python -m launch",
    purpose="Train a causal language model on the GPUs of this machine, or on its CPU.",
    examples=(
        ("python -m launch experiment=demo", "learn real text in minutes, without a GPU"),
        ("python -m launch model=gpt2 parallel=zero2 precision=bf16", "GPT-2 with ZeRO 2 on every GPU"),
        ("python -m launch model=llama3_1_8b parallel=zero3 dry_run=true", "print plan and command, start nothing"),
    ),
    sweeps=True,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say. Returns the exit code of the job, or of the first that failed in a sweep."""
    try:
        arguments = parse_arguments(DOOR, sys.argv[1:] if argv is None else argv)
        if arguments.show is not None:
            print(show(DOOR, arguments))
            return EXIT_FINISHED
        if not arguments.sweep:
            return launch(arguments.overrides, config_dir=arguments.config_dir)[0]
        return sweep(arguments)
    except CookbookError as error:
        return turn_away(error)


def sweep(arguments: Arguments) -> int:
    """One run after another; a failure does not stop the others, a signal does. Returns the first failure's code."""
    runs = expand_sweep(arguments.overrides)
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
    print(f"\n== {codes.count(EXIT_FINISHED)} of {len(runs)} runs finished")
    return next((code for code in codes if code != EXIT_FINISHED), EXIT_FINISHED)


def launch(overrides: Sequence[str], *, config_dir: str | None, stay: bool = False) -> tuple[int, bool]:
    """Plan and start one run. Returns the job's exit code, and whether a signal asked to end.

    stay: keep this process even where the run is one plain process that could take its place.
    Raises CookbookError before anything is started.
    """
    config = load_config(overrides, config_dir=config_dir)
    # A world that surrounds this door (a pod's WORLD_SIZE) is not the one it is about to make.
    plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
    for line in check_memory(config, plan):
        print(line)
    run_dir = Path(config.train.run_dir or default_run_dir(config, datetime.now()))
    commands = _commands(config, plan, overrides, config_dir=config_dir, run_dir=run_dir)
    starting = plan.nodes == 1 and not config.dry_run
    if not starting:  # else rank 0 prints the plan
        print(plan.describe(), end="\n\n")
    if plan.nodes > 1:
        print("Run one line on each node, with the address of the first for NODE_0:")
    print(*(command.text() for command in commands), sep="\n", flush=True)
    if not starting:
        return EXIT_FINISHED, False
    if config.launcher.name is LauncherName.python and not stay:
        replace_process(commands[0])
    return _run(commands[0], run_dir.expanduser())


def _run(command: Command, run_dir: Path) -> tuple[int, bool]:
    """Run to the end. The exit code is that of the rank that ended the run, where it left word in its status file: a
    launcher makes its own 1 of whatever a rank returned."""
    before = read_status(run_dir)
    outcome = run_command(command)
    code, status = outcome.code, read_status(run_dir)
    rank_code, reason = (status.get("exit_code"), status.get("reason")) if status != before else (None, None)
    if code != EXIT_FINISHED and isinstance(rank_code, int):
        code = rank_code
    if code not in (EXIT_FINISHED, EXIT_STOPPED, EXIT_BAD_CONFIG):  # these have been explained in plain lines
        kept = outcome.relay.keep(run_dir / "logs/errors.log")
        rest = f"; all that the ranks and the launcher wrote: {kept}" if kept else ""
        print(f"the run failed: {reason or 'no rank left word why'} (exit code {code}){rest}", file=sys.stderr)
    return code, outcome.told


def _commands(
    config: Config, plan: Plan, overrides: Sequence[str], *, config_dir: str | None, run_dir: Path
) -> list[Command]:
    """One command for each node."""
    port, address = config.launcher.master_port, "NODE_0"
    if plan.nodes == 1:
        port, address = port or free_port(), "127.0.0.1"
    meetings = [Rendezvous(address=address, port=port or DEFAULT_PORT, node_rank=rank) for rank in range(plan.nodes)]
    return [
        build_command(config, plan, overrides, run_dir=run_dir, rendezvous=meeting, config_dir=config_dir)
        for meeting in meetings
    ]


if __name__ == "__main__":
    sys.exit(main())
