"""Activation checkpointing: keep fewer activations in the forward, compute them again in the backward (Chen et al.
2016).

    none        every intermediate tensor of every layer is kept
    full        only each decoder layer's input is kept; the backward runs the layer's forward once more:
                about a third more compute, activations fall from all layers' to one layer's
    selective   matmuls and attention outputs are the expensive part: every second matmul and all
                attention outputs are kept, the rest is computed again (the policy of torchtitan)

No communication of its own. Under sharding the layer's parameters are gathered once more for the recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configs.choices import Checkpointing
from trainer import linear
from trainer.model.build import held_layers

ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def apply_checkpointing(model: nn.Module, mode: Checkpointing) -> None:
    """Make every decoder layer recompute its activations.

    The layer's `forward` is replaced, not its call: hooks that sharding registers on the layer stay outside the
    recomputed part and fire once.
    """
    if mode is Checkpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode is Checkpointing.selective:
        options["context_fn"] = _selective_contexts
    for layer in held_layers(model):
        layer.forward = partial(checkpoint, layer.forward, **options)


def recomputed(forward: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A layer's own forward, and what `checkpoint` is called with around it; nothing where it keeps everything."""
    if isinstance(forward, partial) and forward.func is checkpoint:
        return forward.args[0], forward.keywords
    return forward, {}


def _selective_contexts() -> Any:
    forward, again = create_selective_checkpoint_contexts(_every_second_product())
    forward.ac_graph_id = 1  # the partitioner compares it; torch.compile sets its own
    return forward, again


def _every_second_product() -> Callable[..., CheckpointPolicy]:
    """A policy that counts separately in the forward and in the recompute, which must decide alike."""
    count, matmuls = {False: 0, True: 0}, linear.matmuls()

    def policy(context: Any, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op in ATTENTION_OPS:
            return CheckpointPolicy.MUST_SAVE
        if op in matmuls:
            count[context.is_recompute] += 1
            if count[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
