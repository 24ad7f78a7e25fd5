"""Shards of the model, the axis `dp_shard`: `fsdp` makes them, or DeepSpeed's ZeRO. It combines with every axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from configs.choices import EngineName
from configs.schema import Config
from trainer.plan.views import Axis, View

TEXT = "parameters, gradients and optimizer states sharded over {} (FSDP2)"
AXIS = Axis(name="dp_shard", text=TEXT, reads=True, shards=True)


def problems(config: Config) -> Iterator[str]:
    """Settings of FSDP2 that this run would not read."""
    parallel = config.parallel
    for item in fields(parallel.fsdp):
        value = getattr(parallel.fsdp, item.name)
        if value is None:
            continue
        key = f"parallel.fsdp.{item.name}={value}"
        if parallel.engine is not EngineName.torch:
            yield f"{key}: FSDP2 is of engine torch; leave it out, or use parallel=fsdp"
        elif parallel.pp > 1:
            yield f"{key}: parallel.pp={parallel.pp} keeps the parameters of a stage gathered; leave it out"
        elif parallel.ep != 1:
            yield f"{key}: experts that parallel.ep divides are gathered apart from their layer; leave it out"
        elif item.name == "reshard_size" and parallel.tp > 1:
            yield f"{key}: FSDP2 has no smaller group for what parallel.tp={parallel.tp} has divided; leave it out"
        elif item.name == "reshard_size" and parallel.reshard_after_forward is False:
            yield f"{key}: parallel.reshard_after_forward=false keeps parameters whole; leave one of the two out"


def check_groups(config: Config, view: View) -> Iterator[str]:
    """view: the dense one of the plan, with all degrees filled in."""
    own = config.parallel.fsdp
    given = [(item.name, value) for item in fields(own) if (value := getattr(own, item.name)) is not None]
    size = own.reshard_size
    if given and view.shards == 1 and config.parallel.engine is EngineName.torch:
        name, value = given[0]
        yield f"parallel.fsdp.{name}={value}: nothing is sharded here; leave it out, or use parallel=fsdp"
    elif size is not None and view.shards % size:
        yield (
            f"parallel.fsdp.reshard_size={size}: parameters are sharded over {view.shards} ranks, which are not"
            " divisible by it; use the GPUs of a node, or a divisor of them"
        )


def shard_dim(shape: Sequence[int], whole: Sequence[int], ranks: int) -> int:
    """The dimension along which FSDP divides a parameter: rows, or, for stacked experts whose number is not a multiple
    of the ranks, the first other dimension that the ranks divide and that no other axis divides.

    FSDP2 divides only rows unevenly. With rows alone, ranks beyond the number of experts would hold none of them.
    shape: on one rank before FSDP; whole: of the parameter.
    """
    if len(shape) < 3 or shape[0] % ranks == 0:
        return 0
    even = (dim for dim in range(1, len(shape)) if shape[dim] == whole[dim] and shape[dim] % ranks == 0)
    return next(even, 0)


def in_order(groups: Iterable[str]) -> list[str]:
    """The groups of `fsdp.sharded_modules`, in the order of the forward."""
    return sorted(groups, key=lambda name: (name == "head", name.isdigit(), int(name) if name.isdigit() else 0))
