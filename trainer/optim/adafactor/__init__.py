"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): the second moment's means over rows and over columns.

It is chosen for its memory, so it updates one parameter after the other. The arithmetic is torch.optim.Adafactor's,
which accepts only whole matrices; here the ranks that hold pieces of a matrix add up the sums for its means (`update`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, EngineName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import IMPLEMENTATIONS, OPTIONS, ZEROED, average, fresh, groups, instead, work  # noqa: F401
from trainer.optim.protocol import Group, Held, Kept, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

USES = frozenset({"eps", "weight_decay"})
SMALLEST_EPS = 1e-18  # float32 and bfloat16 hold its square; below, a row without gradients becomes 0 * infinity


def problems(config: Config, view: View) -> Iterator[str]:
    if config.optimizer.eps < SMALLEST_EPS:
        yield f"optimizer.eps={config.optimizer.eps}: adafactor squares it in float32; use {SMALLEST_EPS} or more"
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=adafactor: needs the rows and columns of matrices, and ZeRO's partitions are flat rows; use"
            " parallel=fsdp, hsdp or tensor_fsdp, which shard as much, or optimizer=adamw"
        )


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    from trainer.optim.adafactor.update import Adafactor

    return Adafactor([group.as_torch(settings.lr) for group in grouped], eps=settings.eps)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    """Row and column means of tensors with rows and columns; for vectors the second moment itself."""
    shape = parameter.shape
    if len(shape) < 2:
        return {**common.like(parameter, dtype, "variance"), **common.counter()}
    return {
        "row_var": Kept(shape=(*shape[:-1], 1), dtype=dtype),
        "col_var": Kept(shape=(*shape[:-2], 1, shape[-1]), dtype=dtype),
        **common.counter(),
    }


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    """Temporaries: the update of one parameter; or, before it, the sums of all rows and columns, of which those that
    are divided also lie in one buffer."""
    pieces = [one.piece for one in held]
    rows = [prod(piece.shape[:-1]) for piece in pieces]
    columns = [prod((*piece.shape[:-2], piece.shape[-1])) for piece in pieces]
    sums = sum(rows) + sum(columns)
    divided = [count for count, piece in zip(rows, pieces, strict=True) if piece.shape[-1] < piece.whole[-1]]
    other = [count for count, piece in zip(columns, pieces, strict=True) if piece.shape[-2] < piece.whole[-2]]
    most = max((piece.numel for piece in pieces), default=1)
    return BYTES[dtype] * max(most, sums + max(sum(divided), sum(other)))


def description(settings: Settings) -> str:
    return "states of 1 number per row and 1 per column of every matrix, 1 per element of a vector"
