"""A term of the loss that enters the backward where its gradient belongs: at the logits of a router.

    forward     scores pass unchanged, to the experts
    backward    the gradient of the scores passes unchanged, and the logits get that of the term

So the term needs no output that travels to the loss: a stage of a pipeline, a layer that is computed twice and a model
that DeepSpeed drives have it alike (Megatron's auto-scaler of auxiliary losses works so). Kept for the backward are
the logits; a table of tokens x experts is made for one layer at a time, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Gradient = Callable[[torch.Tensor], torch.Tensor]
"""Of the logits: the gradient of the term by them, in their dtype or a wider one."""


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, logits: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.gradient = gradient
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (logits,) = ctx.saved_tensors
        # Under a recompute this is the node of the first forward, and so is what it was given.
        assert ctx.gradient is not None, "a term that was attached in a recompute is not the one to be differentiated"
        return gradients[0], ctx.gradient(logits).to(logits.dtype), None


def attach(scores: torch.Tensor, logits: torch.Tensor, gradient: Gradient | None) -> torch.Tensor:
    """The scores. gradient: None in a recompute, which repeats what is kept for the backward and nothing else."""
    return _Attached.apply(scores, logits, gradient)  # pyright: ignore[reportReturnType]


def recomputing() -> bool:
    """Whether this forward runs inside a backward, for a layer that has run before."""
    return torch._C._current_graph_task_id() != -1
