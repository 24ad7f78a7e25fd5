"""Runs in each pod of a JobSet: starts this node's ranks, forwards signals to them, and ends with their exit code.

    python -m launch.kubernetes.node OVERRIDES

SIGTERM, which precedes the deletion or eviction of a pod, goes to the ranks. They agree on a step, save, and end with
75 on every node; the JobSet then starts all pods again. With a single node, a rank that dies is restarted in the pod.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from configs.entry_point import EntryPoint, parse_arguments
from configs.errors import ConfigError
from configs.load import load_config
from launch.command import Command, Rendezvous, build_command
from launch.kubernetes.manifest import INDEX
from launch.supervise import run_job
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.answering import answered
from trainer.process.world import for_children

ENTRY_POINT = EntryPoint(
    program="python -m launch.kubernetes.node", purpose="Start one node's ranks, in a pod.", examples=()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run this node's ranks to their end. Returns their exit code."""
    return answered(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    arguments = parse_arguments(ENTRY_POINT, argv)
    missing = [name for name in (INDEX, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set; a pod of a JobSet has them (launch/kubernetes/manifest.py)")
    config = load_config(arguments.overrides, config_dir=arguments.config_dir)
    if config.train.run_dir is None:
        raise ConfigError("train.run_dir=null: all nodes need the same folder; name it")
    plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
    meeting = Rendezvous(
        address=os.environ["MASTER_ADDR"], port=int(os.environ["MASTER_PORT"]), node_rank=int(os.environ[INDEX])
    )
    run_dir = Path(config.train.run_dir)

    def command(again: bool) -> Command:
        return build_command(
            config,
            plan,
            arguments.overrides,
            run_dir=run_dir,
            rendezvous=meeting,
            config_dir=arguments.config_dir,
            environment=for_children(os.environ),
        )

    # Nodes that restart their ranks on their own get out of step with each other; the JobSet restarts all of them.
    restarts = config.launcher.max_restarts if plan.nodes == 1 else 0
    return run_job(command, run_dir, max_restarts=restarts)[0]


if __name__ == "__main__":
    sys.exit(main())
