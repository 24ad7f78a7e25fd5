"""The command that starts a plan's ranks: pure functions from a plan to the arguments of each launcher.

    torchrun --rdzv-backend=loopback --nproc-per-node=2 -m trainer experiment=demo
    deepspeed --num_gpus=2 --master_port=29500 ... --module trainer experiment=demo
    accelerate launch --multi_gpu --num_processes=2 ... --module trainer experiment=demo
    python -m trainer experiment=demo

Overrides are passed on exactly as typed and through no shell. Every rank composes and plans from them again. If the
user left the run folder open, it is named here and appended as one more override. Next: `process`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from configs.choices import LauncherName
from configs.overrides import quote_value
from configs.schema import Config
from slurm.arguments import Place, launcher_arguments, launcher_environment, node_arguments
from trainer.plan.plan import Plan

HOST = "127.0.0.1"  # where the ranks of one node meet
LOOPBACK = "loopback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Rendezvous: address and port of node 0. node_rank: index of the node that this command is for."""

    address: str = HOST
    port: int
    node_rank: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """argv: the command. environment: variables that are added to the caller's environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def text(self) -> str:
        """One shell line, to copy and paste."""
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()), shlex.join(self.argv)]
        )


def build_command(
    config: Config,
    plan: Plan,
    overrides: Sequence[str],
    *,
    run_dir: Path,
    rendezvous: Rendezvous,
    config_dir: str | None = None,
    environment: Mapping[str, str] | None = None,
    cores: int | None = None,
) -> Command:
    """The launcher's command on one node of the plan.

    run_dir: the folder of all ranks, named before they start. environment: the caller's (os.environ); variables that
    it sets are not changed. cores: number of cores of this machine.
    """
    environment = os.environ if environment is None else environment
    cores = cores or os.cpu_count() or 1
    wanted = launcher_environment(config.launcher.name, processes=plan.gpus_per_node, device=plan.device, cores=cores)
    launcher = _launcher_arguments(config, plan, rendezvous, visible=environment.get("CUDA_VISIBLE_DEVICES", ""))
    search = ["--config-dir", config_dir] if config_dir is not None else []
    passed_on = [word for word in overrides if not word.startswith("dry_run=")]
    settled = [f"train.run_dir={quote_value(str(run_dir))}"] if config.train.run_dir is None else []
    return Command(
        argv=(*launcher, "trainer", *search, *passed_on, *settled),
        environment={name: value for name, value in wanted.items() if name not in environment},
    )


def _launcher_arguments(config: Config, plan: Plan, rendezvous: Rendezvous, *, visible: str) -> list[str]:
    """Everything before `trainer`. visible: CUDA_VISIBLE_DEVICES of the caller."""
    name, port = config.launcher.name, config.launcher.master_port
    begin = [sys.executable] if name is LauncherName.python else [program(str(name))]
    begin += ["launch"] * (name is LauncherName.accelerate)
    match name:
        case LauncherName.python:
            world = []
        case _ if plan.nodes > 1:
            world = node_arguments(name, _place(plan, rendezvous))
        case LauncherName.torchrun:
            world = _torchrun(plan, rendezvous, port)
        case LauncherName.deepspeed:
            world = _deepspeed(plan, rendezvous, visible)
        case LauncherName.accelerate:
            world = _accelerate(plan, rendezvous, port)
    return [*begin, *launcher_arguments(name, world, config.launcher.args, ranks=plan.world_size, device=plan.device)]


def _torchrun(plan: Plan, rendezvous: Rendezvous, port: int | None) -> list[str]:
    """port: chosen by the user; None: the rendezvous picks a free one and binds it at once."""
    processes = f"--nproc-per-node={plan.gpus_per_node}"
    if loopback_known():
        chosen = [f"--rdzv-conf=port={port}"] if port is not None else []
        return [f"--rdzv-backend={LOOPBACK}", *chosen, processes]
    return [f"--master-addr={rendezvous.address}", f"--master-port={rendezvous.port}", processes]


@cache
def loopback_known() -> bool:
    """Whether torchrun finds `trainer.process.rendezvous`, which the installed package's metadata names. With an older
    installed version, torch's static rendezvous does the same but listens on every interface."""
    return bool(entry_points(group="torchrun.handlers", name=LOOPBACK))


def _deepspeed(plan: Plan, rendezvous: Rendezvous, visible: str) -> list[str]:
    port = f"--master_port={rendezvous.port}"
    if visible and plan.device == "cuda":
        # --num_gpus would take GPUs 0 to N-1, including those that CUDA_VISIBLE_DEVICES hides.
        return [f"--include=localhost:{','.join(visible.split(',')[: plan.gpus_per_node])}", port]
    return [f"--num_gpus={plan.gpus_per_node}", port]


def _accelerate(plan: Plan, rendezvous: Rendezvous, port: int | None) -> list[str]:
    # The loopback rendezvous has its own port; the launcher only checks that this one is free.
    world = [f"--num_processes={plan.world_size}", "--num_machines=1", f"--main_process_port={rendezvous.port}"]
    if plan.world_size > 1 and loopback_known():
        world += [f"--rdzv_backend={LOOPBACK}", *([f"--rdzv_conf=port={port}"] if port is not None else [])]
    return world


def _place(plan: Plan, rendezvous: Rendezvous) -> Place:
    return Place(
        nodes=plan.nodes,
        node_rank=rendezvous.node_rank,
        processes=plan.gpus_per_node,
        address=rendezvous.address,
        port=rendezvous.port,
    )


def program(name: str) -> str:
    """The launcher next to this Python: by name if a shell would find the same one, else by path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found is not None and (not beside.exists() or Path(found).samefile(beside)):
        return name
    return str(beside)
