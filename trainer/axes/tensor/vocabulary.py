"""Vocabulary parallel: embedding, head and loss, each rank with its own part of the vocabulary.

                       rank 0: entries 0..V/t          rank 1: entries V/t..2V/t        ...
    embedding          rows of its own entries,        the same, for its entries        --all-reduce--> hidden states
                       zero for all others
    head               logits [B, S, V/t]              logits [B, S, V/t]             stay where they are
    loss               max, sum of exponentials, the label's logit, each [B, S]       --2 all-reduces--> loss

The logits are the largest activation of a small model (V entries per token) and never leave their rank: the loss sends
3 numbers per token (4 with `train.label_smoothing`), where a gather would send V. Backward: softmax - one_hot, local,
without communication. The vocabulary need not divide evenly: the last rank gets the remainder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer.axes.tensor.collectives import Ranks
from trainer.data import IGNORED
from trainer.model.loss import Smoothed

WIDE_ELEMENTS = 2**24
"""Logits are widened to float32 in slices of this many elements (64 MiB), never all at once."""


def part_of(vocabulary: int, ranks: Ranks, rank: int | None = None) -> range:
    """The vocabulary entries of this rank, or of another one, divided as torch.chunk does."""
    length, rank = -(-vocabulary // ranks.size), ranks.rank if rank is None else rank
    return range(min(rank * length, vocabulary), min((rank + 1) * length, vocabulary))


def embedding_forward(module: nn.Embedding, ranks: Ranks) -> Callable[..., torch.Tensor]:
    """A forward for an embedding whose `weight` is this rank's rows. Keeps a subclass's changes to the result, such as
    scaling."""
    own = part_of(module.num_embeddings, ranks)
    lookup, padding = module.forward, module.padding_idx

    def forward(ids: torch.Tensor) -> torch.Tensor:
        here = (ids >= own.start) & (ids < own.stop)
        # Only for the call: initialisation needs the row's number in the whole matrix.
        module.padding_idx = padding - own.start if padding is not None and padding in own else None
        try:
            rows = lookup(torch.where(here, ids - own.start, 0))
        finally:
            module.padding_idx = padding
        return ranks.leave(rows.masked_fill(~here.unsqueeze(-1), 0))

    return forward


def cross_entropy_sum(ranks: Ranks, vocabulary: int) -> Smoothed:
    """`trainer.model.loss.cross_entropy_sum` for divided logits: a function of (logits, labels).

    logits: this rank's [batch, seq_len, part of the vocabulary]; labels: [batch, seq_len], already shifted, the same on
    all ranks, IGNORED where there is none. Returns the sum over the valid positions, the same on all ranks: float64 for
    float64 logits, else float32.
    """
    start = part_of(vocabulary, ranks).start

    def loss(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
        weights = Weights.of(smoothing, vocabulary)
        return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), start, ranks.group, weights)

    return loss


def chunked_cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, *, smoothing: float = 0.0) -> torch.Tensor:
    """`trainer.model.loss.cross_entropy_sum` for whole logits, without a full float32 copy: besides the logits and
    their gradient it holds one slice in float32. Of 14 bytes per token and vocabulary entry (16-bit logits) 4
    remain."""
    weights = Weights.of(smoothing, logits.shape[-1])
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), 0, None, weights)


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight of a token's label, and of every vocabulary entry, including the label. The sum is 1."""

    label: float
    word: float

    @staticmethod
    def of(smoothing: float, entries: int) -> Weights:
        return Weights(1 - smoothing, smoothing / entries)


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits unchanged and one number per token; the backward recomputes the softmax."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        start: int,
        group: dist.ProcessGroup | None,
        weights: Weights,
    ) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        valid = labels != IGNORED
        here = valid & (labels >= start) & (labels < start + logits.shape[-1])
        column = torch.where(here, labels - start, 0)
        largest = logits.amax(-1).to(wide)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # exp_sum, the label's logit and, with label smoothing, the sum of all logits, in one collective.
        sums = torch.empty((3 if weights.word else 2, *labels.shape), dtype=wide, device=logits.device)
        for rows, shifted in _shifted(logits, largest):
            if weights.word:
                sums[2, rows] = shifted.sum(-1)
            sums[0, rows] = shifted.exp_().sum(-1)
        labelled = logits.gather(1, column[:, None]).squeeze(1).to(wide) - largest
        sums[1] = torch.where(here, labelled, 0)
        if group is not None:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        ctx.save_for_backward(logits, largest + log_sum, column, here, valid)
        ctx.weights = weights
        expected = sums[1] * weights.label + sums[2] * weights.word if weights.word else sums[1]
        return torch.where(valid, log_sum - expected, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        logits, log_total, column, here, valid = ctx.saved_tensors
        result = torch.empty_like(logits)
        weight = gradients[0] * valid
        for rows, shifted in _shifted(logits, log_total):
            softmax = shifted.exp_()
            labelled = here[rows, None].to(softmax.dtype)
            if ctx.weights.word:
                softmax.sub_(ctx.weights.word)
                labelled.mul_(ctx.weights.label)
            softmax.scatter_add_(1, column[rows, None], -labelled)
            result[rows] = softmax.mul_(weight[rows, None])
        return result, None, None, None, None


def _shifted(logits: torch.Tensor, by: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of each slice, and there `logits - by` in the dtype of `by`, which has one number per token.

    All slices share one buffer, which the caller may overwrite: new memory for each would take longer than the sums.
    """
    buffer: torch.Tensor | None = None
    for rows in slices(logits):
        part = logits[rows]
        buffer = torch.empty_like(part, dtype=by.dtype) if buffer is None else buffer
        yield rows, buffer[: len(part)].copy_(part).sub_(by[rows, None])


def slices(logits: torch.Tensor) -> Iterator[slice]:
    """Rows of logits [tokens, entries] that are widened together."""
    step = max(1, WIDE_ELEMENTS // logits.shape[-1])
    return (slice(first, first + step) for first in range(0, logits.shape[0], step))
