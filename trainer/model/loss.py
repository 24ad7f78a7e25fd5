"""The loss of a causal language model, as a sum over tokens; the engine divides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from trainer.data import IGNORED

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A loss of logits and labels."""


class Smoothed(Protocol):
    """smoothing: share of each label that is spread evenly over the whole vocabulary (Szegedy et al. 2016)."""

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor: ...


def in_training(loss: Smoothed, smoothing: float) -> Loss:
    """A loss with gradients is smoothed; a validation loss, which has none, is not."""
    if not smoothing:
        return loss

    def chosen(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(logits, labels, smoothing=smoothing if torch.is_grad_enabled() else 0.0)

    return chosen


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross-entropy over the valid positions. smoothing: as `Smoothed`.

    logits: [batch, seq_len, vocab], labels: [batch, seq_len], already shifted, IGNORED where there is none. Returns a
    scalar: float64 for float64 logits, else float32 (a 16-bit log-softmax over a large vocabulary loses the small
    probabilities that make up the gradient).
    """
    if logits.dtype is not torch.float64:
        logits = logits.float()
    options = {"ignore_index": IGNORED, "reduction": "sum", "label_smoothing": smoothing}
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
