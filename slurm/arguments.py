"""Each launcher's arguments, on one node and on several, for `launch.command` and clusters. Standard library only.

Rendezvous is static: every node gets its rank and the first node's address. The dynamic kind (c10d) orders nodes by
name as text, joins another job's store when the port is taken, and unpickles whatever anyone sends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One node among several. address, port: of the first node, where the ranks meet. hostfile: for deepspeed."""

    nodes: int
    node_rank: int
    processes: int
    address: str
    port: int
    hostfile: str = "HOSTFILE"


def node_arguments(launcher: str, place: Place) -> list[str]:
    """The world of several nodes."""
    match launcher:
        case "torchrun":
            # A worker that dies ends its node's agent, and with it the job: agents that restart workers on their own
            # get out of step with each other.
            world = {"--nnodes": place.nodes, "--node-rank": place.node_rank, "--master-addr": place.address}
            world |= {"--master-port": place.port, "--nproc-per-node": place.processes}
        case "deepspeed":
            # Its other multi-node modes need ssh to each node, or MPI.
            rest = {"--node_rank": place.node_rank, "--master_addr": place.address, "--master_port": place.port}
            return [f"--hostfile={place.hostfile}", "--no_ssh", *(f"{flag}={value}" for flag, value in rest.items())]
        case "accelerate":
            world = {"--num_processes": place.nodes * place.processes, "--num_machines": place.nodes}
            world |= {"--machine_rank": place.node_rank, "--main_process_ip": place.address}
            world |= {"--main_process_port": place.port}
        case _:
            world = {}
    return [f"{flag}={value}" for flag, value in world.items()]


def launcher_arguments(
    launcher: str, world: Sequence[str], args: Sequence[str], *, ranks: int, device: str
) -> list[str]:
    """Everything between the launcher's program and `trainer`. world: number of ranks and their rendezvous. args: the
    user's own."""
    match launcher:
        case "deepspeed":
            # The ranks read LOCAL_RANK, so --local_rank would be redundant. The log is about the launcher itself: how
            # it starts and kills each process.
            return [*world, "--log_level=critical", "--no_local_rank", *args, "--module"]
        case "accelerate":
            # --multi_gpu is its name for starting ranks with torch, on CPUs too; its --cpu wants MPI. Every value is
            # stated: what is left out is taken from the user's accelerate config file, or warned about.
            kind = ["--multi_gpu"] if ranks > 1 else ["--cpu"] if device == "cpu" else []
            return [*kind, *world, "--mixed_precision=no", "--dynamo_backend=no", *args, "--module"]
        case _:
            return [*world, *args, "-m"]


def launcher_environment(launcher: str, *, processes: int, device: str, cores: int) -> dict[str, str]:
    """Environment variables that a node's launcher needs, if they are not set already."""
    wanted: dict[str, str] = {}
    if processes > 1:
        # Otherwise each rank's thread pool would take every core, and the ranks would compete. With GPUs each rank gets
        # its share, for optimizers that run on the CPU.
        wanted["OMP_NUM_THREADS"] = str(max(1, cores // processes) if device == "cuda" else 1)
    if device == "cpu" and launcher == "deepspeed":
        # Its runner uses a GPU wherever it finds one, and warns if it finds none.
        wanted["DS_ACCELERATOR"] = "cpu"
    return wanted


def restart_overrides(overrides: Sequence[str], resume: str) -> list[str]:
    """The overrides of a restart. resume: `train.resume`. A run that had to be new has since become one to continue."""
    if resume != "never":
        return [*overrides]
    return [*(word for word in overrides if not word.startswith("train.resume=")), "train.resume=auto"]


def hostfile(hosts: list[str], processes: int) -> str:
    """DeepSpeed's list of nodes, the first one first."""
    return "".join(f"{host} slots={processes}\n" for host in hosts)
