"""The loss of a causal language model, as a sum over tokens: who divides, and by what, is the engine's business."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from trainer.data import IGNORED

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits and labels."""


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over the valid positions.

    logits: [batch, seq_len, vocab], labels: [batch, seq_len], already shifted, IGNORED where there is none.
    Returns a scalar: float64 for float64 logits, else float32 (a 16-bit log-softmax over a large vocabulary
    loses the small probabilities that the gradient is made of).
    """
    if logits.dtype is not torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
