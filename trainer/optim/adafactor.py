"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), torch's: means over each matrix's rows and columns.

It is chosen for its memory, so `auto` updates one parameter after the other. torch has no fused kernel of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, EngineName, Implementation
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.protocol import Group, Held, Kept, Spread, State

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (Implementation.for_loop, Implementation.foreach)
USES = frozenset({"eps", "weight_decay"})
OPTIONS = None
groups = common.decayed_and_plain
work = common.elementwise
fresh = common.fresh
SMALLEST_EPS = 1e-18  # float32 and bfloat16 hold its square; below, a row without gradients becomes 0 * infinity
SMALLEST_SCALE = 1e-3  # the paper's epsilon 2: a parameter whose elements are all zero still moves


def problems(config: Config, *, sharded: bool) -> Iterator[str]:
    """It factors whole matrices: a DTensor's column means are norms over ranks, which torch cannot square in place."""
    if config.optimizer.eps < SMALLEST_EPS:
        yield f"optimizer.eps={config.optimizer.eps}: adafactor squares it in float32; use {SMALLEST_EPS} or more"
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=adafactor: needs the rows and columns of whole matrices, and DeepSpeed's partitions are"
            " flat; use parallel=ddp, or optimizer=adamw"
        )
    elif sharded:
        yield (
            "optimizer.name=adafactor: torch computes it on whole matrices only, and pp, dp_shard, cp and tp make"
            " sharded tensors of them; use parallel=ddp, or optimizer=adamw"
        )


def build(groups: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    foreach = settings.implementation is Implementation.foreach
    params = [group.as_torch(settings.lr) for group in groups]
    return torch.optim.Adafactor(params, lr=settings.lr, eps=(settings.eps, SMALLEST_SCALE), foreach=foreach)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    """Row and column means of whatever has rows and columns, and of vectors the second moment itself."""
    shape = parameter.shape
    if len(shape) < 2:
        return {**common.like(parameter, dtype, "variance"), **common.counter()}
    return {
        "row_var": Kept(shape=(*shape[:-1], 1), dtype=dtype),
        "col_var": Kept(shape=(*shape[:-2], 1, shape[-1]), dtype=dtype),
        **common.counter(),
    }


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    """The updates of all parameters; or one by one that update, with the squared means of rows and columns, and the
    update before it."""
    sizes = common.nbytes(held, dtype)
    if settings.implementation is Implementation.foreach:
        return sum(sizes)
    means = [sum(kept.nbytes for kept in state(one.piece, settings, dtype).values()) for one in held]
    most = zip(sizes, means, (0, *sizes), strict=False)
    return max((size + mean + before for size, mean, before in most), default=0) if held else BYTES[dtype]


def said(settings: Settings) -> str:
    return "states of 1 number per row and 1 per column of every matrix, 1 per element of a vector"
