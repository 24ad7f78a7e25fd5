"""A term of the loss that enters the backward where its gradient belongs: at the logits of a router.

    forward     scores pass unchanged, to the experts
    backward    the gradient of the scores passes unchanged, and the logits get that of the term

So the term needs no output that travels to the loss, and works in a pipeline stage, a recomputed layer and a model that
DeepSpeed drives (like Megatron's auto-scaler of auxiliary losses). The backward keeps the logits; a table of tokens x
experts is made for one layer at a time, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Gradient = Callable[[torch.Tensor], torch.Tensor]
"""Gradient of the term by the logits, in their dtype or a wider one."""


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, logits: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.gradient = gradient
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (logits,) = ctx.saved_tensors
        # Under a recompute this is the node of the first forward, with its arguments.
        assert ctx.gradient is not None, "a term that was attached in a recompute is not the one to be differentiated"
        return gradients[0], ctx.gradient(logits).to(logits.dtype), None


def attach(scores: torch.Tensor, logits: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
    """The scores. gradient: None in a recompute, which repeats only the computation of kept tensors."""
    return _Attached.apply(scores, logits, gradient)  # pyright: ignore[reportReturnType]


def recomputing() -> bool:
    """Whether this forward runs inside a backward, for a layer that has run before."""
    return torch._C._current_graph_task_id() != -1
