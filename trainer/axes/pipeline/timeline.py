"""Pipeline schedules in time: what each rank does in which order, how long it waits, how much it holds.

Time runs to the right; 0 is the forward of micro-batch 0 through a rank's stage, aA its backward, which takes twice as
long: a is the gradient of the stage's input (the rank before waits for it), A that of its weights (nobody does).

    gpipe              all forwards, then all backwards: every micro-batch is held until its backward
    rank 0  01234567.........aAbBcCdDeEfFgGhH
    rank 1  .01234567......aAbBcCdDeEfFgGhH..
    rank 2  ..01234567...aAbBcCdDeEfFgGhH....
    rank 3  ...01234567aAbBcCdDeEfFgGhH......

    1f1b               a backward as soon as there is one: the ranks wait as long, and rank r holds at most p - r
    rank 0  0123......aA4bB5cC6dD7eE.fF.gG.hH
    rank 1  .012....aA3bB4cC5dD6eE7fF.gG.hH..
    rank 2  ..01..aA2bB3cC4dD5eE6fF7gG.hH....
    rank 3  ...0aA1bB2cC3dD4eE5fF6gG7hH......

    zbv_zero_bubble    two stages per rank, in a V, each half as long; gradients of weights fill the gaps
    rank 0  01234560aA1bB2cC3dD7aA4eEbB5fFcC6gGdD7hHeEfFgGhH...
    rank 1  .01234051aA2bB3cC6aA4dD7bB5eEcC6fFdD7gGehfEgFhGHH..
    rank 2  ..01203142aA3bB5aA4cC6bB5dD7cC6eEdD7fFegfhgEhFGHGH.
    rank 3  ...00112233aA4aA4bB5bB5cC6cC6dD7dD7eEeffgghhEFGHFGH

With p ranks, m micro-batches and v stages per rank the ranks wait (p-1) / (m+p-1) of the time under gpipe and 1f1b,
(p-1) / (vm+p-1) when interleaved: more micro-batches or more stages per rank help, and every further stage sends every
activation once more. The share here is not from a formula but from a simulation, action by action.
Torch-free. Next: `probe`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from trainer.axes.pipeline.orders import Action, rank_orders
from trainer.axes.pipeline.receives import most_received, with_receives
from trainer.axes.pipeline.table import SCHEDULES, default_stages_per_rank

DURATION = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
"""In forwards of the same stage: each gradient takes as many multiply-adds as the forward."""


class Slot(NamedTuple):
    """An action with its time, in forwards of a stage of cost 1."""

    action: Action
    begin: float
    end: float


def timeline(schedule: str, orders: Sequence[Sequence[Action]], stage_costs: Sequence[float]) -> list[list[Slot]]:
    """Each rank's actions with begin and end, if every action starts as soon as its rank is free and its input has
    arrived, and sending takes no time. stage_costs: duration of each stage's forward."""
    pp, last = len(orders), len(stage_costs) - 1
    done: dict[Action, float] = {}
    slots: list[list[Slot]] = [[] for _ in orders]
    rank = waiting = 0
    while waiting < pp:
        row = slots[rank]
        waiting += 1
        for action in orders[rank][len(row) :]:
            kind, stage, micro_batch = action
            ready: float | None = 0.0
            if kind == "F" and stage > 0:
                ready = done.get(Action("F", stage - 1, micro_batch))
            elif kind in "BI" and stage < last:
                ready = done.get(Action("B", stage + 1, micro_batch), done.get(Action("I", stage + 1, micro_batch)))
            if ready is None:
                break
            begin = max(ready, row[-1].end if row else 0.0)
            done[action] = begin + DURATION[kind] * stage_costs[stage]
            row.append(Slot(action, begin, done[action]))
            waiting = 0
        rank = (rank + 1) % pp
    assert all(len(row) == len(order) for row, order in zip(slots, orders, strict=True)), f"{schedule} deadlocks"
    return slots


def bubble_fraction(
    schedule: str,
    *,
    pp: int,
    micro_batches: int,
    stages_per_rank: int | None = None,
    stage_costs: Sequence[float] | None = None,
) -> float:
    """Share of the ranks' time in which they wait for one another, in [0, 1).

    stage_costs: relative cost of each stage; equal by default. Uneven stages wait more.
    """
    costs = tuple(stage_costs or [1.0] * (pp * (stages_per_rank or default_stages_per_rank(schedule))))
    return _bubble(schedule, pp, micro_batches, stages_per_rank, costs)


@cache
def _bubble(schedule: str, pp: int, micro_batches: int, stages_per_rank: int | None, costs: tuple[float, ...]) -> float:
    orders = rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
    slots = timeline(schedule, orders, costs)
    busy = sum(slot.end - slot.begin for row in slots for slot in row)
    return 1.0 - busy / (pp * max(row[-1].end for row in slots))


def in_flight(
    schedule: str,
    *,
    pp: int,
    micro_batches: int,
    stages_per_rank: int | None = None,
    stage_weights: Sequence[float] | None = None,
) -> list[dict[int, int]]:
    """For each rank: {stage: micro-batches whose activations it holds} at the moment when it holds most.

    Held from the forward until the gradient of the weights is computed. stage_weights: size of one micro-batch in each
    stage (its layers, its bytes); equal by default. Peak bytes = sum(count * bytes of that stage).
    """
    peaks = []
    for order in rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank):
        held: Counter[int] = Counter()
        peak: dict[int, int] = {}
        largest = 0.0
        for kind, stage, _ in order:
            held[stage] += {"F": 1, "I": 0}.get(kind, -1)
            size = sum(count * (stage_weights[number] if stage_weights else 1.0) for number, count in held.items())
            if size > largest:
                largest, peak = size, dict(held)
        peaks.append(peak)
    return peaks


def receive_buffers(schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int | None = None) -> list[int]:
    """For each rank the number of hidden states [micro_batch, seq, hidden_size] that it reserves for receiving.

    With one stage per rank: as many as it has micro-batches in flight, whose activations begin with them, and one for a
    gradient. With several: as many as its receives need, which are posted early (`receives`).
    """
    if SCHEDULES[schedule].arrangement == "one":
        held = in_flight(schedule, pp=pp, micro_batches=micro_batches)
        return [held[rank][rank] * (rank > 0) + (rank < pp - 1) for rank in range(pp)]
    v = stages_per_rank or default_stages_per_rank(schedule)
    orders = with_receives(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=v)
    return [most_received(order) for order in orders]


def draw_schedule(schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int | None = None) -> str:
    """The timeline as text, one line per rank, for up to 10 micro-batches. One column is one forward of a stage; with
    several stages per rank, the order shows which one."""
    assert micro_batches <= 10
    orders = rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
    v = stages_per_rank or default_stages_per_rank(schedule)
    lines = []
    rows = timeline(schedule, orders, [1.0] * (pp * v))
    width = int(max(row[-1].end for row in rows))
    for rank, row in enumerate(rows):
        cells = ["."] * width
        for (kind, _, micro_batch), begin, end in row:
            small = chr(ord("a") + micro_batch)
            text = {"F": str(micro_batch), "B": small + small.upper(), "I": small, "W": small.upper()}[kind]
            cells[int(begin) : int(end)] = text
        lines.append(f"rank {rank}  {''.join(cells)}")
    return "\n".join(lines)
