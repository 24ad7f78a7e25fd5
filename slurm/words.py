"""The words that start the ranks of one of several nodes, for each launcher. Pure, standard library only.

Rendezvous is static: every node is told its rank and the first node's address. The dynamic kind (c10d) orders nodes by
their names as text, joins another job's store when the port is taken, and unpickles what anyone sends it.
"""

from __future__ import annotations

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


def torchrun_words(place: Place) -> list[str]:
    """A worker that dies ends its node's agent, and with it the job: agents that restart workers on their own get out
    of step with each other."""
    return [
        f"--nnodes={place.nodes}",
        f"--node-rank={place.node_rank}",
        f"--master-addr={place.address}",
        f"--master-port={place.port}",
        f"--nproc-per-node={place.processes}",
    ]


def deepspeed_words(place: Place) -> list[str]:
    """Its other ways to several nodes need ssh to each of them, or MPI."""
    return [
        f"--hostfile={place.hostfile}",
        "--no_ssh",
        f"--node_rank={place.node_rank}",
        f"--master_addr={place.address}",
        f"--master_port={place.port}",
    ]


def accelerate_words(place: Place) -> list[str]:
    return [
        f"--num_processes={place.nodes * place.processes}",
        f"--num_machines={place.nodes}",
        f"--machine_rank={place.node_rank}",
        f"--main_process_ip={place.address}",
        f"--main_process_port={place.port}",
    ]


def hostfile(hosts: list[str], processes: int) -> str:
    """DeepSpeed's list of nodes, the first one first."""
    return "".join(f"{host} slots={processes}\n" for host in hosts)
