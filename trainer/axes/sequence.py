"""Context parallel: each rank holds a slice of every sequence; only attention needs the others' slices.

    rank 0   tokens 0..n/c      embed, norms, MLP, head: no communication     labels are shifted already, so the loss
    rank 1   tokens n/c..2n/c   and no rank ever holds a whole sequence       needs no neighbour either

    attention, ulysses:  all-to-all turns slices of the sequence into slices of the heads, and back
        [all heads, n/c tokens] --> [h/c heads, all n tokens] --> attention --> [all heads, n/c tokens]
    attention, gather:   every rank gathers all keys and values and attends with its own queries
        [all heads, n/c queries] x [kv heads, all n keys, values]

c ranks, sequence n, h heads and k key/value heads of size d, b bytes per element. Each rank sends per layer, forward
(as much again backward): ulysses (c - 1)/c * (2 h + 2 k) d b n/c, gather (c - 1) * 2 k d b n/c. Activations fall to
1/c. With a causal mask `gather` gives the last rank more work than the first; `ulysses` is balanced, but the heads must
be divisible. Ranks of one group read the same samples. Parameters are sharded over dp_shard x cp: for them, more tokens
is more data. Jacobs et al. 2023 (DeepSpeed Ulysses), Dubey et al. 2024, section 3.3.2 (key/value gather).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, PreTrainedModel

from configs.choices import ContextMethod
from configs.errors import PlanError
from trainer.axes import CONTEXT
from trainer.axes.tensor.collectives import Ranks, paired
from trainer.data import Batch

NAME = "context_parallel"
BY_LENGTH = {"longrope", "dynamic"}
"""Rotary embeddings whose frequencies depend on the largest position that they are given."""


def apply_context_parallel(model: PreTrainedModel, mesh: DeviceMesh, *, method: ContextMethod) -> None:
    """Extend every attention of the model by the exchange over the mesh axis `cp`, in place.

    transformers builds no mask for an attention function that it does not know, so this function must be causal itself.
    """
    attention, ranks = _ulysses if method is ContextMethod.ulysses else _gather, Ranks(mesh.get_group(CONTEXT))
    AttentionInterface.register(NAME, partial(_attend, ranks=ranks, method=attention))
    model.set_attn_implementation(NAME)
    rotate_as_whole(model, rank=ranks.rank, size=ranks.size)


def rotate_as_whole(model: nn.Module, *, rank: int, size: int) -> None:
    """Let rotary embeddings that choose frequencies by length see where the whole sequence ends, in place.

    Otherwise the first ranks of a long sequence would rotate as for a short one, and the last ones as for a long one.
    """

    def extended(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        own = named["position_ids"]
        last = own[..., -1:] + (size - 1 - rank) * own.shape[-1]
        return (named.pop("x"),), {**named, "position_ids": torch.cat([own, last], dim=-1)}

    def cut(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)

    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if not BY_LENGTH.isdisjoint(kinds.values() if isinstance(kinds, dict) else [kinds]):
            module.register_forward_pre_hook(extended, with_kwargs=True)
            module.register_forward_hook(cut)


def slice_of(batch: Batch, mesh: DeviceMesh) -> Batch:
    """This rank's part of every sequence, with its tokens' positions in the whole."""
    ranks = mesh.get_group(CONTEXT)
    size, rank = ranks.size(), ranks.rank()
    rows, length = batch.input_ids.shape[0], batch.input_ids.shape[1] // size
    begin = rank * length
    return replace(
        batch,
        input_ids=batch.input_ids[:, begin : begin + length].contiguous(),
        labels=batch.labels[:, begin : begin + length].contiguous(),
        position_ids=torch.arange(begin, begin + length, device=batch.input_ids.device).repeat(rows, 1),
        lengths=None if batch.lengths is None else (batch.lengths - begin).clamp(min=0, max=length),
    )


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    ranks: Ranks,
    method: Callable[..., torch.Tensor],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """An attention function in transformers' interface. query: [batch, heads, seq_len / cp, head_dim]; key, value with
    their own number of heads. Returns [batch, seq_len / cp, heads, head_dim]."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise PlanError(
            f"parallel.cp={ranks.size}: {type(module).__name__} needs masks, caps or sinks; use parallel.cp=1"
        )
    attended = method(query, key, value, ranks, window=sliding_window, scale=scaling, dropout=dropout)
    return attended.transpose(1, 2).contiguous(), None


def _ulysses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: Ranks, **options: Any) -> torch.Tensor:
    copies = _copies(q.shape[1], k.shape[1], ranks.size)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    q, k, v = (paired(x, partial(_to_heads, ranks=ranks), partial(_to_sequence, ranks=ranks)) for x in (q, k, v))
    attended = _causal_attention(q, k, v, first_query=0, **options)
    return paired(attended, partial(_to_sequence, ranks=ranks), partial(_to_heads, ranks=ranks))


def _gather(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: Ranks, **options: Any) -> torch.Tensor:
    k, v = (_whole_sequence(x, ranks) for x in (k, v))
    return _causal_attention(q, k, v, first_query=ranks.rank * q.shape[2], **options)


def _whole_sequence(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """[batch, heads, n/c, d] -> [batch, heads, n, d], by way of the shape [batch, sequence, features]."""
    _, heads, _, size = x.shape
    gathered = ranks.enter_sequence(x.transpose(1, 2).flatten(2))
    return gathered.unflatten(2, (heads, size)).transpose(1, 2)


def _copies(heads: int, kv_heads: int, size: int) -> int:
    """How many times each key/value head is repeated so that every rank gets equally many, and those of its queries."""
    return next(n for n in range(1, heads + 1) if kv_heads * n % size == 0 and heads % (kv_heads * n) == 0)


def _causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    first_query: int,
    window: int | None,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """Each query sees keys up to its own position, and at most `window` back. first_query: position of q[0] among the
    keys, which start at position 0."""
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": q.shape[1] != k.shape[1]}
    if first_query == 0 and q.shape[2] == k.shape[2] and window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    behind = (first_query + torch.arange(q.shape[2], device=q.device))[:, None] - torch.arange(
        k.shape[2], device=q.device
    )
    seen = behind >= 0
    if window is not None:
        seen &= behind < window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options)


def _to_heads(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """[batch, heads, n/c, d] -> [batch, heads/c, n, d]."""
    batch, heads, length, size = x.shape
    dealt = x.reshape(batch, ranks.size, heads // ranks.size, length, size).movedim(1, 0)
    return _exchange(dealt, ranks).movedim(0, 2).reshape(batch, heads // ranks.size, ranks.size * length, size)


def _to_sequence(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """[batch, heads/c, n, d] -> [batch, heads, n/c, d]."""
    batch, heads, length, size = x.shape
    dealt = x.reshape(batch, heads, ranks.size, length // ranks.size, size).movedim(2, 0)
    return _exchange(dealt, ranks).movedim(0, 1).reshape(batch, ranks.size * heads, length // ranks.size, size)


def _exchange(dealt: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Part i of the first dimension goes to rank i; rank i's message arrives at index i."""
    dealt = dealt.contiguous()
    received = torch.empty_like(dealt)
    dist.all_to_all_single(received, dealt, group=ranks.group)
    return received
