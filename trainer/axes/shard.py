"""Shards of the model, the axis `dp_shard`: `fsdp` does it, or DeepSpeed's ZeRO. It goes with everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.schema import Config
from trainer.plan.views import Axis

WORDS = "parameters, gradients and optimizer states sharded over {} (FSDP2)"
AXIS = Axis(name="dp_shard", words=WORDS, reads=True, shards=True)


def problems(config: Config) -> Iterator[str]:
    yield from ()


def shard_dim(shape: Sequence[int], whole: Sequence[int], ranks: int) -> int:
    """The dimension that FSDP cuts a parameter along: rows, or, of stacked experts whose number is no multiple of the
    ranks, the first other one that the ranks do divide and that nothing else cuts.

    FSDP2 cuts rows unevenly and no other dimension so. With rows alone, ranks beyond the number of experts would hold
    none of them. shape: of what one rank has before; whole: of the parameter.
    """
    if len(shape) < 3 or shape[0] % ranks == 0:
        return 0
    even = (dim for dim in range(1, len(shape)) if shape[dim] == whole[dim] and shape[dim] % ranks == 0)
    return next(even, 0)
