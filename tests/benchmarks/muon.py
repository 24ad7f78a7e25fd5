"""Compares the updates of Muon and torch.optim.Muon on the same DTensors, in one run: time and collectives.

    torchrun --nproc-per-node 4 -m tests.benchmarks.muon                          the matrices of a small Llama
    torchrun --nproc-per-node 4 -m tests.benchmarks.muon hidden=1024 layers=2     other sizes
    torchrun --nproc-per-node 4 -m tests.benchmarks.muon page=docs/optimizers.md  writes the table there

Both iterate in bfloat16, the only dtype of torch.optim.Muon. Their updates alternate, so a slowdown of the machine
affects both. Times are medians over the rounds; the time of a round is that of the slowest rank. The error is that of
the change of all parameters after all updates, relative to a third contender that iterates in float64.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.support.measured import conditions, write
from trainer.model.roles import Matrices
from trainer.optim.muon.update import Muon

SIZES = {"hidden": 512, "layers": 4, "rounds": 5}
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
Parameters = list[nn.Parameter]


def main(words: list[str]) -> None:
    given = dict(word.split("=") for word in words)
    page = given.pop("page", None)
    sizes = {**SIZES, **{key: int(value) for key, value in given.items()}}
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    layouts = {"fsdp": {"dp_shard": ranks}, "tensor_fsdp": {"dp_shard": ranks // 2, "tp": 2}}
    rows = []
    for layout, axes in layouts.items():
        mesh = init_device_mesh("cuda" if cuda else "cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        rows += compare(layout, mesh, sizes)
    if dist.get_rank() == 0:
        text = table(rows, sizes, ranks)
        print(text)
        if page:
            write(Path(page), " ".join([f"torchrun --nproc-per-node {ranks} -m tests.benchmarks.muon", *words]), text)
    dist.destroy_process_group()


def compare(layout: str, mesh: DeviceMesh, sizes: dict[str, int]) -> list[str]:
    """The table rows of one layout."""
    theirs, ours, exact = (build(mesh, sizes) for _ in range(3))
    start = [parameter.detach().clone() for parameter in exact]
    steps = {"torch.optim.Muon": by_torch(theirs), "this trainer": by_us(ours, torch.bfloat16)}
    counted = {name: count(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(sizes["rounds"]):
        for name, step in steps.items():
            seconds[name].append(timed(step))
    reference = by_us(exact, torch.float64)
    for _ in range(2 + sizes["rounds"]):
        reference()
    errors = {"torch.optim.Muon": error(theirs, exact, start), "this trainer": error(ours, exact, start)}
    base, calls = statistics.median(seconds["torch.optim.Muon"]), counted["torch.optim.Muon"]
    rows = []
    for name, found in seconds.items():
        median = statistics.median(found)
        rows.append(
            f"| `{layout}` | {name} | {median * 1e3:.0f} | {median / base:.3f} | {counted[name]} |"
            f" {counted[name] / calls:.4f} | {errors[name]:.1%} |"
        )
    return rows


def build(mesh: DeviceMesh, sizes: dict[str, int]) -> Parameters:
    """The matrices of a Llama's layers with a gradient, sharded as in the trainer."""
    torch.manual_seed(0)
    module, hidden = nn.Module(), sizes["hidden"]
    tensor = "tp" in (mesh.mesh_dim_names or ())
    for layer in range(sizes["layers"]):
        one = nn.Module()
        for name, shape, dim in shapes(hidden):
            value = torch.randn(shape, device=mesh.device_type) * 0.02
            if tensor:
                value = distribute_tensor(value, mesh["tp"], [Replicate() if dim is None else Shard(dim)])
            one.register_parameter(name, nn.Parameter(value))
        fully_shard(one, mesh=mesh["dp_shard"])
        module.add_module(str(layer), one)
    fully_shard(module, mesh=mesh["dp_shard"])
    parameters = list(module.parameters())
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        local = torch.randn_like(parameter.to_local())
        parameter.grad = DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return parameters


def shapes(hidden: int) -> list[tuple[str, tuple[int, int], int | None]]:
    """Name, shape [out, in] and tensor-parallel dimension of each matrix of a layer.

    There are a quarter as many key and value heads as query heads.
    """
    wide = 8 * hidden // 3 // 16 * 16
    return [
        ("q", (hidden, hidden), 0),
        ("k", (hidden // 4, hidden), 0),
        ("v", (hidden // 4, hidden), 0),
        ("o", (hidden, hidden), 1),
        ("gate", (wide, hidden), 0),
        ("up", (wide, hidden), 0),
        ("down", (hidden, wide), 1),
    ]


def by_torch(parameters: Parameters) -> Callable[[], None]:
    return torch.optim.Muon(parameters, **OPTIONS).step


def by_us(parameters: Parameters, dtype: torch.dtype) -> Callable[[], None]:
    group = {"params": parameters, "matrices": [Matrices()] * len(parameters), "dtype": dtype}
    return Muon([{**group, **OPTIONS}]).step


def count(step: Callable[[], None]) -> int:
    """Number of collectives in the second update; the first creates the states."""
    step()
    with CommDebugMode() as counted:
        step()
    return counted.get_total_counts()


def timed(step: Callable[[], None]) -> float:
    """Seconds of one update on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def error(found: Parameters, exact: Parameters, start: list[torch.Tensor]) -> float:
    """Norm of the difference of all parameters, divided by the norm of their change."""
    apart = torch.zeros(2, dtype=torch.float64)
    for one, other, begin in zip(found, exact, start, strict=True):
        for place, difference in enumerate((one.detach() - other.detach(), other.detach() - begin)):
            assert isinstance(difference, DTensor)
            apart[place] += difference.full_tensor().double().square().sum().cpu()
    return (apart[0] / apart[1]).sqrt().item()


def table(rows: list[str], sizes: dict[str, int], ranks: int) -> str:
    layers, hidden = sizes["layers"], sizes["hidden"]
    numel = layers * sum(rows * columns for _, (rows, columns), _ in shapes(hidden))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "gloo"
    lines = [
        f"{conditions('torch')}, {where}, ranks: {ranks}; {layers * len(shapes(hidden))} matrices, {numel / 1e6:.1f} M"
        f" parameters in float32, of {layers} layers of width {hidden}; iteration in bfloat16.",
        "",
        "| layout | update by | ms per update | time ratio | collectives per update | their ratio | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join([*lines, *rows]) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
