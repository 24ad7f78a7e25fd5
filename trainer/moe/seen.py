"""What a kind of balancing gets to know of one router and one micro-batch, and of the step that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One call of one router in training.

    layer: number of the router in the whole model.
    top_k: experts that a token goes to.
    counts: [sequences, experts], int64: tokens that went to each expert, without padding.
    sums: [sequences, experts]: probabilities of the experts, added over the same tokens.
    lengths: [sequences], int64: these tokens.
    micro_batch: what the routers of one micro-batch share.
    """

    layer: int
    top_k: int
    counts: torch.Tensor
    sums: torch.Tensor
    lengths: torch.Tensor
    micro_batch: dict[str, Any]

    @property
    def experts(self) -> int:
        return self.counts.shape[1]


def _same(counts: torch.Tensor) -> torch.Tensor:
    return counts


@dataclass(kw_only=True, slots=True)
class Step:
    """What is known before the first forward of a step.

    tokens: without padding, over all ranks and micro-batches.
    sequences, micro_batches: likewise.
    load: [layers, experts], float64: tokens that went to each expert in the step before; zeros before the first.
    whole_sequences: adds up counts of the ranks that hold parts of the same sequences. A collective of these.
    """

    tokens: float
    sequences: int
    micro_batches: int
    load: torch.Tensor
    whole_sequences: Callable[[torch.Tensor], torch.Tensor] = field(default=_same)
