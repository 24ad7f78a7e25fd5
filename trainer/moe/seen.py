"""Inputs of a balancing kind: one router's micro-batch, and the step that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One call of one router in training.

    layer: index of the router in the whole model.
    top_k: experts per token.
    counts: [sequences, experts], int64: tokens that went to each expert, without padding.
    sums: [sequences, experts]: probabilities of the experts, summed over the same tokens.
    lengths: [sequences], int64: number of these tokens.
    micro_batch: data that the routers of one micro-batch share.
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
    """Facts known before the first forward of a step.

    tokens: number of tokens without padding, over all ranks and micro-batches.
    sequences, micro_batches: their numbers, likewise.
    load: [layers, experts], float64: tokens per expert in the previous step; zeros before the first step.
    whole_sequences: adds up counts of the ranks that hold parts of the same sequences. A collective of these ranks.
    """

    tokens: float
    sequences: int
    micro_batches: int
    load: torch.Tensor
    whole_sequences: Callable[[torch.Tensor], torch.Tensor] = field(default=_same)
