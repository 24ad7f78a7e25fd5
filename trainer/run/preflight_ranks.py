"""Checks that need all ranks, made before anything is built (`launcher.preflight`, on for several nodes).

    versions    Python and packages are the same everywhere
    devices     as many processes on each node as planned, the same GPU under each
    network     an all-reduce over all ranks: its bandwidth, and any rank that is slow on its own
    folder      the run folder is one folder for all nodes, and every node may write in it
    room        for the checkpoints that will lie there at the same time
    NVMe        the swap folder's write speed, where states are offloaded to it

Problems end the run with one line each, on every rank; rank 0 prints the measurements.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from configs.choices import OffloadDevice
from configs.errors import EnvironmentProblem
from configs.schema import Config
from trainer.model.precision import torch_dtype
from trainer.model.roles import describe
from trainer.optim.table import kept_bytes
from trainer.passes import prepare_model
from trainer.plan.plan import Plan
from trainer.process.disks import write_speed
from trainer.process.runtime import Runtime
from trainer.report.provenance import versions

GIB = 2**30
ALL_REDUCE_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}
MATRIX = {"cuda": 4096, "cpu": 256}
REPEATS = 3
MARK = ".preflight"
SLOW = 1.5  # times the median


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """Report of one rank. seconds: for the same matmuls on each; nvme: bytes per second of its swap folder."""

    host: str
    local_rank: int
    versions: dict[str, str]
    gpu: str
    seconds: float
    nvme: float | None


def wanted(config: Config, plan: Plan) -> bool:
    """Whether this run makes these checks."""
    return plan.nodes > 1 if config.launcher.preflight is None else config.launcher.preflight


def preflight(config: Config, plan: Plan, runtime: Runtime, folder: Path) -> None:
    """Check if requested, and print the results. A collective. Raises as `check_ranks`."""
    if wanted(config, plan):
        lines = check_ranks(config, plan, runtime, folder)
        if runtime.is_main:
            print(*lines, sep="\n", flush=True)


def check_ranks(config: Config, plan: Plan, runtime: Runtime, folder: Path) -> list[str]:
    """Check. Returns the lines to print. A collective. Raises EnvironmentProblem, the same on all ranks."""
    everyone = runtime.gather(_ask(config, plan, runtime))
    problems = [*_compare(everyone), *_count(everyone, plan), *_share(folder, runtime, everyone)]
    needed, free = runtime.gather(_room(config, folder) if runtime.is_main else (0, 0))[0]
    if needed > free:
        problems.append(
            f"train.run_dir={folder}: {free / GIB:.1f} GiB are free, the checkpoints take {needed / GIB:.1f}"
            f" (checkpoint.keep_last={config.checkpoint.keep_last}, and one more while it is written); make room, or"
            " choose another disk"
        )
    if problems:
        raise EnvironmentProblem(*problems)
    return [
        f"preflight  {len(everyone)} ranks on {len({rank.host for rank in everyone})} node(s) agree;"
        f" {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free for checkpoints",
        f"           {_network(runtime)}",
        f"           {_slowest(everyone)}",
        *(f"           {line}" for line in _nvme(config, everyone)),
    ]


def _ask(config: Config, plan: Plan, runtime: Runtime) -> Rank:
    found = versions(runtime.device)
    packages = {name: str(version) for name, version in found["packages"].items()}
    offload = OffloadDevice.nvme in (plan.offload_optimizer, plan.offload_parameters)
    path = config.parallel.offload.nvme_path
    return Rank(
        host=socket.gethostname(),
        local_rank=runtime.local_rank,
        versions={"python": found["python"], **packages},
        gpu=found["device"]["name"] if runtime.device.type == "cuda" else "",
        seconds=_work_seconds(runtime.device),
        nvme=write_speed(Path(path).expanduser()) if offload and path and runtime.local_rank == 0 else None,
    )


def _compare(everyone: list[Rank]) -> Iterator[str]:
    """One line for each difference: the most common value, and the ranks that differ."""
    kinds = {name: [rank.versions.get(name, "None") for rank in everyone] for name in everyone[0].versions}
    for name, values in {**kinds, "GPU": [rank.gpu for rank in everyone]}.items():
        usual = Counter(values).most_common(1)[0][0]
        others = {f"{value} on {rank.host}" for value, rank in zip(values, everyone, strict=True) if value != usual}
        if others:
            yield f"cluster: {name} is {usual} on most ranks, but {', '.join(sorted(others))}; use the same everywhere"


def _count(everyone: list[Rank], plan: Plan) -> Iterator[str]:
    for host, processes in Counter(rank.host for rank in everyone).items():
        # Several nodes of a plan may share a machine, as in a test, but only whole nodes.
        if processes % plan.gpus_per_node:
            yield (
                f"cluster.gpus_per_node={plan.gpus_per_node}: {processes} ranks run on {host}; start the planned"
                " number on each node"
            )


def _share(folder: Path, runtime: Runtime, everyone: list[Rank]) -> list[str]:
    """Each node's first rank leaves a file, and all ranks check that they see every file. A collective."""
    mark, problem = folder / f"{MARK}-{runtime.rank}", ""
    if runtime.local_rank == 0:
        try:
            mark.write_text("")
        except OSError as error:
            problem = f"train.run_dir={folder}: cannot be written on {socket.gethostname()} ({error.strerror})"
    dist.barrier()
    marks = [f"{MARK}-{number}" for number, rank in enumerate(everyone) if rank.local_rank == 0]
    deadline = time.monotonic() + 10.0  # network file systems show new files late
    while not all((folder / name).exists() for name in marks) and time.monotonic() < deadline and not problem:
        time.sleep(0.1)
    if not problem and not all((folder / name).exists() for name in marks):
        problem = f"train.run_dir={folder}: {socket.gethostname()} does not see what other nodes write there"
    problems = runtime.gather(problem)
    if runtime.local_rank == 0:
        mark.unlink(missing_ok=True)
    remedy = "; choose a folder on a file system that all nodes share"
    return [text + remedy for text in dict.fromkeys(problems) if text]


def _room(config: Config, folder: Path) -> tuple[int, int]:
    """Maximum bytes of checkpoints and the exported model, and the free bytes."""
    model = prepare_model(config)
    # Adapters are saved without their base model.
    described, dtype = describe(model, config.parallel.tensor_plan), config.precision.master_dtype
    trained = [described[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    weights = sum(about.numel for about in trained) * torch_dtype(dtype).itemsize
    states = kept_bytes(trained, config.optimizer, dtype)
    kept = config.checkpoint.keep_last + config.checkpoint.best + 1
    return (weights + states) * kept + weights * config.train.export, shutil.disk_usage(folder).free


def _work_seconds(device: torch.device) -> float:
    """The fastest of several rounds of matmuls on this rank's device."""
    side = MATRIX[device.type]
    matrix = torch.ones(side, side, device=device)
    times = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        for _ in range(4):
            matrix = (matrix @ matrix) / side
        matrix.sum().item()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _network(runtime: Runtime) -> str:
    size = ALL_REDUCE_BYTES[runtime.device.type]
    buffer = torch.zeros(size // 4, device=runtime.device)
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(buffer)
        buffer[0].item()
        times.append(time.perf_counter() - begin)
    seconds = runtime.max(min(times[1:]))[0]
    # The bytes that each rank sends and receives in a ring: comparable between numbers of ranks.
    bus = 2 * (runtime.world_size - 1) / runtime.world_size * size / seconds
    return f"all-reduce of {size // 2**20} MiB over {runtime.world_size} ranks: {bus / 1e9:.2f} GB/s per rank"


def _slowest(everyone: list[Rank]) -> str:
    times = sorted(rank.seconds for rank in everyone)
    number = max(range(len(everyone)), key=lambda rank: everyone[rank].seconds)
    slow, usual = everyone[number], times[len(times) // 2]
    factor = slow.seconds / usual
    warning = ": every step waits for it" if factor > SLOW else ""
    return f"slowest rank {number} on {slow.host}: {factor:.2f} times the median's time for the same work{warning}"


def _nvme(config: Config, everyone: list[Rank]) -> Iterator[str]:
    speeds = {rank.host: rank.nvme for rank in everyone if rank.nvme is not None}
    if speeds:
        host = min(speeds, key=lambda name: speeds[name])
        path = config.parallel.offload.nvme_path
        yield f"{path} writes {speeds[host] / 1e9:.2f} GB/s on {host}, the slowest node"
