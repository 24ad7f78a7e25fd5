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


Term = tuple[int, Callable[[], torch.Tensor], torch.Tensor]
"""Of one router and micro-batch: the layer, the weights of the experts, the sums of their probabilities."""


@dataclass(slots=True)
class MicroBatch:
    """The micro-batch that a module's forward is at, as its routers see it. shape: sequences and tokens of each.
    counted: [sequences, tokens], false for padding and for virtual tokens; None: all count."""

    shape: tuple[int, int]
    counted: torch.Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)

    def lengths(self, device: torch.device) -> torch.Tensor:
        if self.counted is None:
            return torch.full((self.shape[0],), self.shape[1], device=device)
        return self.counted.sum(dim=1)


def micro_batch(
    inputs: torch.Tensor, lengths: torch.Tensor | None, *, before: int, part: tuple[int, int]
) -> MicroBatch:
    """inputs: [sequences, tokens, ...], as a module gets them. lengths: of its sequences without padding; None: all of
    them. before: virtual tokens of each. part: which of how many equal parts of each sequence its routers see."""
    sequences, tokens, counted = inputs.shape[0], before + inputs.shape[1], None
    if before or lengths is not None:
        places = torch.arange(-before, inputs.shape[1], device=inputs.device)
        counted = places >= 0 if lengths is None else (places >= 0) & (places < lengths[:, None])
        counted = counted.expand(sequences, -1)
    rank, parts = part
    tokens //= parts
    return MicroBatch((sequences, tokens), None if counted is None else counted[:, rank * tokens : (rank + 1) * tokens])
