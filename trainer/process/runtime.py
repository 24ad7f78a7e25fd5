"""This process in the job: its rank, device and process group.

A process without a launcher is rank 0 of a world of one and runs the same code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from configs.errors import CookbookError, EnvironmentProblem, RankProblem, TrainingFailed
from trainer.plan.plan import Plan
from trainer.process.rendezvous import HOST, SOCKET_VARIABLES, local_store, stay_on_this_machine
from trainer.process.world import VARIABLES

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """Ranks as torchrun exports them. device: this rank's compute device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum of numbers over all ranks, in float64. A collective."""
        return self.add_up(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same tensor, summed over all ranks. A collective."""
        if self.world_size > 1:  # one rank would wait for a thread of the backend
            dist.all_reduce(tensor)
        return tensor

    def max(self, *values: float) -> list[float]:
        """Largest of each number over all ranks. A collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, text: str) -> str:
        """Rank 0's text on every rank. A collective."""
        box = [text]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank and return its result. A collective.

        A CookbookError on any rank is raised on all of them: no rank waits for one that has failed.
        """
        result, kind, problems = None, CookbookError, ()
        try:
            result = work()
        except CookbookError as error:
            # All ranks will report it, so it is no longer the problem of one.
            kind = EnvironmentProblem if isinstance(error, RankProblem) else type(error)
            problems = error.problems
        failed = [(kind, problems) for kind, problems in self.gather((kind, problems)) if problems]
        if failed:
            everyone = dict.fromkeys(problem for _, rank_problems in failed for problem in rank_problems)
            raise failed[0][0](*everyone)
        return cast(T, result)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank. It must be small and from this project, because it is pickled. A
        collective."""
        return gather(value)


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every rank of a group, on each of them. A collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def dropout_stream(plan: Plan, rank: int) -> int:
    """Index of this rank's random stream: ranks of a tensor-parallel group share one, all others have their own. Equal
    activations need equal dropout, or the hidden states of the ranks diverge."""
    return plan.dense.place(rank, lambda axis: not axis.joint)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def join_world(plan: Plan, *, timeout_minutes: float) -> Iterator[Runtime]:
    """Enter the process group of the plan's world and leave it at the end.

    The environment is restored at the end. Raises RankProblem if the device is missing. A collective that exceeds the
    timeout raises.
    """
    rank = int(os.environ.get("RANK", "0"))
    device = _device(plan)
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _environment_kept():
        launched = "RANK" in os.environ
        if not launched:
            # DeepSpeed reads these when it is imported into a process without a launcher.
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        if plan.nodes == 1:
            stay_on_this_machine()
        dist.init_process_group(
            backend,
            timeout=timeout,
            device_id=device if launched and device.type == "cuda" else None,
            **_meeting(plan, rank, timeout),
        )
        try:
            yield Runtime(rank=rank, local_rank=local_rank(), world_size=plan.world_size, device=device)
            # Otherwise the first rank to finish would tear down the store that the others still use.
            dist.barrier()
        finally:
            leave_world()


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Restore the world's variables at the end: the next run in this process has its own world."""
    names = (*VARIABLES, *SOCKET_VARIABLES)
    before = {name: os.environ[name] for name in names if name in os.environ}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _meeting(plan: Plan, rank: int, timeout: timedelta) -> dict[str, Any]:
    """The rendezvous of the ranks: none for a world of one; else the launcher's store, or one that rank 0 opens.

    Raises TrainingFailed if rank 0 cannot open it: another port may work, so the run may be restarted.
    """
    if plan.world_size == 1:
        return {"store": HashStore(), "rank": 0, "world_size": 1}
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    agents_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if plan.nodes > 1 or agents_store or address not in (HOST, "localhost"):
        return _restarted(timeout)
    try:
        # All ranks name their store: torch prefixes the keys of a store that it makes itself.
        store = local_store(int(port), timeout) if rank == 0 else TCPStore(HOST, int(port), timeout=timeout)
    except OSError as error:
        raise TrainingFailed(
            f"MASTER_PORT={port}: the ranks cannot meet there ({error.strerror}); choose another port"
        ) from None
    return {"store": store, "rank": rank, "world_size": plan.world_size}


def _restarted(timeout: timedelta) -> dict[str, Any]:
    """Rendezvous of ranks that torchrun has restarted (`--max-restarts`); empty otherwise.

    Its store outlives them, with the addresses of the killed ranks, and torch 2.13 looks for this start's addresses
    under the same names. A rank that reads early gets stale addresses, so each restart uses its own names; on one node
    only, because the agents of several nodes count their restarts separately.
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not count or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    return {"store": PrefixStore(f"restart-{count}", store), "rank": rank, "world_size": world_size}


def _device(plan: Plan) -> torch.device:
    if plan.device == "cpu":
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise RankProblem(
            f"cluster.gpus_per_node={plan.gpus_per_node}: rank with LOCAL_RANK={local_rank()} finds"
            f" {torch.cuda.device_count()} usable GPU(s); start fewer processes per node, or set cluster.device=cpu"
        )
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def leave_world() -> None:
    """Destroy the process groups, and DTensor's caches of them.

    DTensor caches the placement of results by the placement of arguments, and treats two meshes of the same ranks and
    names as one: in the next world, or after a trace on a fake mesh, results would refer to destroyed groups.
    """
    from torch.distributed.tensor import DTensor, debug

    dist.destroy_process_group()
    propagator = DTensor._op_dispatcher.sharding_propagator
    getattr(debug, "_clear_sharding_prop_cache", propagator.propagate_op_sharding.cache_clear)()
