"""AdamW with its two moments in eight bits, decoded for each update.

    moment of N values ----> 256 values share a scale ----> 8-bit codes of a dynamic map     1 + 4 / 256 bytes per value

Blocks are counted along the rows of the whole matrix, so every layout of engine torch holds the same codes (`update`
explains how ranks that share a block agree). Small tensors gain nothing and keep the parameter's dtype. So do vectors,
and embeddings, whose sparse gradients are large. Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization,
arXiv:2110.02861, sections 2.1 to 2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, EngineName, OptimizerName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described, Role
from trainer.optim import common
from trainer.optim.adamw_8bit.blocks import AT_ONCE, BLOCK, SMALLEST
from trainer.optim.common import IMPLEMENTATIONS, OPTIONS, ZEROED, average, fresh, groups, work  # noqa: F401
from trainer.optim.protocol import Group, Held, Kept, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

USES = frozenset({"beta1", "beta2", "eps", "weight_decay"})


def problems(config: Config, view: View) -> Iterator[str]:
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=adamw_8bit: blocks of 256 values of a matrix's row share a scale, and ZeRO's partitions are"
            " flat rows of many parameters; use parallel=fsdp, hsdp or tensor_fsdp, which shard as much, or"
            " optimizer=adamw"
        )


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    from trainer.optim.adamw_8bit.update import AdamW8bit

    params = [group.as_torch(settings.lr) for group in grouped]
    return AdamW8bit(params, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def instead(parameter: Described, settings: Settings) -> Settings | None:
    return None if _quantized(parameter) else replace(settings, name=OptimizerName.adamw)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    """Codes; and the scales of the blocks of each row, which every rank has for whole rows."""
    blocks = (*parameter.shape[:-1], -(-parameter.whole[-1] // BLOCK))
    return {
        **common.like(parameter, "uint8", "exp_avg", "exp_avg_sq"),
        **{kind: Kept(shape=blocks, dtype="float32") for kind in ("exp_avg_scale", "exp_avg_sq_scale")},
        **common.counter(),
    }


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    """Temporaries: two moments and the root of one, or the indices of their codes, for the rows that are decoded at a
    time; a widened gradient. For rows that several ranks share, the maxima of their blocks, also in one buffer."""
    pieces = [one.piece for one in held]
    width = max(4, BYTES[dtype])
    each = 3 * width + (width if BYTES[dtype] < width else 0)
    most = max((each * _at_once(piece) for piece in pieces), default=0)
    shared = [piece for piece in pieces if piece.shape[-1] < piece.whole[-1]]
    return most + sum(2 * 2 * 4 * prod(piece.shape[:-1]) * -(-piece.whole[-1] // BLOCK) for piece in shared)


def description(settings: Settings) -> str:
    return (
        f"states of 2 x (1 + 4 / {BLOCK}) bytes per value, and twice the bytes of embeddings, vectors and matrices of"
        f" fewer than {SMALLEST:,} values"
    )


def _quantized(parameter: Described) -> bool:
    """By the whole parameter, so all ranks and layouts agree."""
    return parameter.role is not Role.embedding and len(parameter.whole) >= 2 and prod(parameter.whole) >= SMALLEST


def _at_once(piece: Described) -> int:
    """Number of values of a piece that are decoded at a time: whole rows of columns that fill blocks, or of the
    others."""
    rows, columns = prod(piece.shape[:-1]), piece.shape[-1]
    full = columns - columns % BLOCK
    return max(min(rows, max(1, AT_ONCE // part)) * part for part in (full, columns - full) if part)
