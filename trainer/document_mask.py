"""`data.document_mask`: how attention learns where documents end, and the start-up check that it does.

The trainer restarts the positions in every document, 0 1 2 0 1 2 3 ..., and passes no mask: transformers derives the
borders from the positions and builds the mask that its attention needs, seq_len x seq_len for each sequence.

    position_ids    0 1 2 0 1 2 3 | 0 1 2 3 4 0 1       two rows of a micro-batch
    cu_seq_lens     0     3       7         12  14      where documents end, over all rows one after the other

Kernels that take lengths need no mask. transformers derives lengths only from positions of a single row, and treats
several rows as sequences without borders, so the trainer passes the lengths (`give_lengths`).

Architectures that make their own masks, or carry a state along the sequence, would silently train across the borders;
others do not pass lengths on. So a shrunk copy computes two documents packed in one row and separately: the logits must
agree. A few lines that take the same lengths replace the GPU kernel in this check.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import flash_attention_mask

from configs.errors import ConfigError, first_line
from trainer.model.miniature import small_model

log = logging.getLogger(__name__)
TOLERANCE = 1e-5
"""Tolerance for float64 logits. Some architectures compute norms in float32 whatever the model's dtype."""
LENGTHS = (3, 5)


NAME = "documents_by_length"
"""The stand-in's."""


def give_lengths(model: nn.Module) -> None:
    """Extend each forward that gets positions with the matching lengths, under transformers' names."""
    model.register_forward_pre_hook(_with_lengths, with_kwargs=True)


def _with_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.get("position_ids")
    if positions is None:
        return args, kwargs
    flat = positions.reshape(-1)
    ends = torch.cat([(flat == 0).nonzero()[:, 0], flat.new_tensor([flat.numel()])]).to(torch.int32)
    longest = int(ends.diff().max())
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return args, {**kwargs, **lengths}


def check_document_mask(config: PretrainedConfig, *, lengths: bool = False) -> None:
    """Raise ConfigError if attention crosses the border between packed documents. Computes on the CPU.

    lengths: whether the attention kernel takes them.
    """
    try:
        apart = _difference(config, lengths=lengths)
    except Exception as error:  # a miniature config may break any rule of its architecture
        reason = first_line(error)
        if lengths:
            raise ConfigError(
                f"data.document_mask=true: nothing shows that a {config.model_type} passes lengths of documents to its"
                f" attention, since a small copy does not run with them: {reason}; use model.attention=sdpa"
            ) from None
        log.warning("data.document_mask not checked: a small %s does not run: %s", config.model_type, reason)
        return
    if apart > TOLERANCE:
        remedy = "use model.attention=sdpa, or set it to false" if lengths else "set it to false"
        raise ConfigError(
            f"data.document_mask=true: a {config.model_type} sees across the border between packed documents whatever"
            f" their {'lengths' if lengths else 'positions'} say; {remedy}"
        )


@torch.no_grad()
def _difference(config: PretrainedConfig, *, lengths: bool) -> float:
    """Largest difference of the logits between documents packed in two rows, and each document alone."""
    model = small_model(config)
    if lengths:
        AttentionInterface.register(NAME, _within_lengths)
        AttentionMaskInterface.register(NAME, flash_attention_mask)
        model.set_attn_implementation(NAME)
        give_lengths(model)
    ids = torch.arange(3, 3 + sum(LENGTHS)).repeat(2, 1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).repeat(2, 1)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = []
    for document in ids.split(LENGTHS, dim=1):
        own = {"position_ids": torch.arange(document.shape[1]).repeat(2, 1)} if lengths else {}
        alone.append(model(input_ids=document, use_cache=False, **own).logits)
    return (packed - torch.cat(alone, dim=1)).abs().max().item()


def _within_lengths(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention inside each document, computed from lengths as a kernel does; without them, inside each row."""
    rows, heads, size, width = query.shape
    key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    ends = torch.arange(rows + 1) * size if cu_seq_lens_q is None else cu_seq_lens_q.to(torch.int64)
    document = torch.bucketize(torch.arange(rows * size), ends[1:], right=True)
    place = torch.arange(rows * size)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if sliding_window is not None:
        seen &= place[:, None] - place < sliding_window
    flat = [each.transpose(1, 2).reshape(rows * size, heads, -1).transpose(0, 1) for each in (query, key, value)]
    scores = flat[0] @ flat[1].transpose(1, 2) * (width**-0.5 if scaling is None else scaling)
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ flat[2]
    return mixed.transpose(0, 1).reshape(rows, size, heads, -1), None
