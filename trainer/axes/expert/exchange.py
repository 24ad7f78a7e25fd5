"""Tokens on their way to experts of other ranks, and back.

    rank 0   router: token -> experts 1, 6     its experts 0..3     rows for rank 0 | rows for rank 1
    rank 1   router: token -> experts 0, 2     its experts 4..7                  \\/
                                                                      all-to-all, as many rows as were chosen
    experts, on the rows that came             sum over a row's experts here, weighted by the router
                                                                      all-to-all back, one row for each that was sent
    token = sum of the rows that came back

A token goes to each rank at most once, however many of its experts are there, and comes back as one row. Every rank
first gathers the routes of its group, 4 bytes per token and expert; then all know every message size, without further
communication. Collectives per layer: that gather and two all-to-alls forward, two all-to-alls backward. Bytes that each
rank sends in one all-to-all, N tokens of H features, ep ranks, r ranks per token (`expected_rows`): N r (ep - 1) / ep *
H.

`transformers.distributed.expert_parallel.AllToAllEP` computes the same, but sends a token once per expert. Version 5.23
refuses a pipeline and an ep that is not a multiple of tp, and splits no sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from trainer.axes.expert import expected_rows
from trainer.axes.tensor.collectives import Ranks, paired

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""An experts module of transformers: (hidden [n, features], expert [n, 1], weight [n, 1]) -> [n, features]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Rows and the local experts that they chose, sorted by expert. slot: the pair's index in [rows, k]."""

    row: torch.Tensor
    slot: torch.Tensor
    expert: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """tokens: of this rank, sorted by destination rank. sent, received: number of rows to and from each."""

    tokens: torch.Tensor
    sent: list[int]
    received: list[int]
    pairs: Pairs


def exchanged(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    *,
    experts: Experts,
    ranks: Ranks,
    count: int,
    imbalance: float,
) -> torch.Tensor:
    """Outputs of all ranks' experts for this rank's tokens. A collective of `ranks`.

    hidden: [n, features]; index, weights: [n, k], index -1 for nothing. n is the same on all ranks. count: experts per
    rank. imbalance: for a trace, which has no values (`_traced`).
    """
    traced = isinstance(index, FakeTensor)
    routes = _traced(index, ranks, count, imbalance) if traced else _routes(index, ranks, count)
    there = partial(_swap, sent=routes.sent, received=routes.received, ranks=ranks)
    back = partial(_swap, sent=routes.received, received=routes.sent, ranks=ranks)
    if weights.dtype == hidden.dtype:
        rows = paired(torch.cat([hidden, weights], dim=1)[routes.tokens], there, back)
        rows, scores = rows.split([hidden.shape[1], weights.shape[1]], dim=1)
    else:
        rows, scores = (paired(x[routes.tokens], there, back) for x in (hidden, weights))
    made = paired(computed(rows, scores, routes.pairs, experts), back, there)
    return summed(made, routes.tokens, hidden.shape[0])


def computed(rows: torch.Tensor, scores: torch.Tensor, pairs: Pairs, experts: Experts) -> torch.Tensor:
    """For each row, the weighted sum of the outputs of its local experts."""
    chosen = rows[pairs.row]
    if chosen.shape[0]:
        made = experts(chosen, pairs.expert[:, None], scores.new_ones(pairs.expert.shape[0], 1))
    else:
        # Every rank's expert parameters get a gradient, here of zeros: sharding adds it to those of others.
        nothing = chosen.sum(dim=0, keepdim=True)
        zero = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
        made = experts(nothing, zero, scores.new_ones(1, 1))[:0]
    made = made * scores.reshape(-1)[pairs.slot, None]
    return summed(made.to(rows.dtype), pairs.row, rows.shape[0])


def summed(rows: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
    """[count, features]: the sum of the rows of each index, in the same order on every run."""
    total = rows.new_zeros(count, rows.shape[1])
    if rows.is_cuda:
        # `index_add` adds in the order in which its threads arrive.
        return total.index_put((place,), rows, accumulate=True)
    return total.index_add(0, place, rows)


def pairs_here(index: torch.Tensor, first: int, count: int, number: int | None = None) -> Pairs:
    """index: [rows, k]. first, count: the local experts. number: of pairs, if known."""
    flat = index.reshape(-1).long() - first
    expert, order = torch.where((flat >= 0) & (flat < count), flat, count).sort(stable=True)
    number = int((expert < count).sum()) if number is None else number
    slot = order[:number]
    return Pairs(row=slot // index.shape[1], slot=slot, expert=expert[:number])


def _routes(index: torch.Tensor, ranks: Ranks, count: int) -> Routes:
    every = ranks.gathered(index.int()).unflatten(0, (ranks.size, -1))
    at = torch.div(every, count, rounding_mode="floor")
    here = (at == ranks.rank).any(dim=2)
    # One more column, for pairs without an expert.
    goes = torch.zeros(index.shape[0], ranks.size + 1, dtype=torch.bool, device=index.device)
    mine = at[ranks.rank].long()
    goes = goes.scatter_(1, torch.where(mine < 0, ranks.size, mine), True)[:, : ranks.size].T
    counts = torch.cat([goes.sum(dim=1), here.sum(dim=1), (at == ranks.rank).sum()[None]]).tolist()
    sent, received, number = counts[: ranks.size], counts[ranks.size : -1], counts[-1]
    tokens = torch.nonzero_static(goes, size=sum(sent))[:, 1]
    rows = torch.nonzero_static(here, size=sum(received))
    chosen = every[rows[:, 0], rows[:, 1]]
    return Routes(
        tokens=tokens, sent=sent, received=received, pairs=pairs_here(chosen, ranks.rank * count, count, number)
    )


def _traced(index: torch.Tensor, ranks: Ranks, count: int, imbalance: float) -> Routes:
    """Replaces `_routes` for tensors without values: all ranks send equally much, and this one receives `imbalance`
    times the average."""
    tokens, chosen = index.shape
    rows = tokens * expected_rows(ranks.size, ranks.size * count, chosen)
    most = tokens * ranks.size
    sent, received = round(rows), min(most, round(rows * imbalance))
    number = balanced_pairs(most, chosen, ranks=ranks.size, count=count, imbalance=imbalance)
    empty = partial(torch.zeros, dtype=torch.long, device=index.device)
    ranks.gathered(index.int())
    return Routes(
        tokens=empty(sent),
        sent=_evenly(sent, ranks.size),
        received=_evenly(received, ranks.size),
        pairs=Pairs(row=empty(number), slot=empty(number), expert=empty(number)),
    )


def balanced_pairs(tokens: int, chosen: int, *, ranks: int, count: int, imbalance: float) -> int:
    """Pairs that a rank computes in a trace: its share of the group's pairs, or `imbalance` times as many."""
    return min(tokens * min(chosen, count), round(tokens * chosen / ranks * imbalance))


def _evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _swap(x: torch.Tensor, *, sent: list[int], received: list[int], ranks: Ranks) -> torch.Tensor:
    """sent, received: number of rows to and from each rank."""
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), received, sent, group=ranks.group)
    return result
