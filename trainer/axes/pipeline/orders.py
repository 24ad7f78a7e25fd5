"""Pipeline schedules as orders: the sequence of forwards and backwards on each rank.

A schedule is one list per rank. Inputs come from the rank of the previous stage, gradients from that of the next, and
a rank waits for what has not arrived; `timeline` simulates and draws it.

    1f1b, rank 2 of 4, 4 micro-batches        F0 F1 B0 F2 B1 F3 B2 B3
    zbv_zero_bubble splits B                  I: gradient of the stage's input, W: gradient of its weights

The orders are those of torch's engine (`torch.distributed.pipelining`), which runs them; the tests compare.
Huang et al. 2019, GPipe; Narayanan et al. 2021, Megatron-LM (1f1b, interleaved); Lamy-Poirier 2023 (looped_bfs); Qi et
al. 2024, Zero Bubble; DeepSeek-AI 2024 (DualPipe). Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from trainer.axes.pipeline.table import default_stages_per_rank


class Action(NamedTuple):
    """kind: F forward; B whole backward; I gradient of the stage's input; W gradient of its weights."""

    kind: str
    stage: int
    micro_batch: int


def rank_orders(
    schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int | None = None
) -> list[list[Action]]:
    """For each pipeline rank the actions of one step, in execution order."""
    v = stages_per_rank or default_stages_per_rank(schedule)
    return [_BUILDERS[schedule](pp, micro_batches, v, rank) for rank in range(pp)]


class _Order:
    """Writes one rank's actions; micro-batches pass each stage in ascending order."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.actions: list[Action] = []
        self.forwards: Counter[int] = Counter()
        self.backwards: Counter[int] = Counter()
        self.owed: list[tuple[int, int]] = []  # stages and micro-batches whose weight gradient is still to be computed

    def forward(self, stage: int) -> None:
        self._add("F", stage, self.forwards[stage])
        self.forwards[stage] += 1

    def backward(self, stage: int, *, whole: bool = True) -> None:
        micro_batch = self.backwards[stage]
        self._add("B" if whole else "I", stage, micro_batch)
        self.backwards[stage] += 1
        if not whole:
            self.owed.append((stage, micro_batch))

    def weights(self, stage: int | None = None) -> None:
        """The oldest pending weight gradient (of this stage), if any."""
        for owed in self.owed:
            if stage is None or owed[0] == stage:
                self.owed.remove(owed)
                self._add("W", *owed)
                return

    def _add(self, kind: str, stage: int, micro_batch: int) -> None:
        # A V schedule is written for as many micro-batches as fill it; surplus ones are left out.
        if micro_batch < self.micro_batches:
            self.actions.append(Action(kind, stage, micro_batch))


def _gpipe(pp: int, m: int, v: int, rank: int) -> list[Action]:
    return [Action(kind, rank, micro_batch) for kind in "FB" for micro_batch in range(m)]


def _1f1b(pp: int, m: int, v: int, rank: int) -> list[Action]:
    order = _Order(m)
    for _ in range(min(m, pp - 1 - rank)):
        order.forward(rank)
    for _ in range(m):
        order.forward(rank)
        order.backward(rank)
    return order.actions


def _looped_bfs(pp: int, m: int, v: int, rank: int) -> list[Action]:
    stages = range(rank, pp * v, pp)
    forwards = [Action("F", stage, micro_batch) for stage in stages for micro_batch in range(m)]
    return forwards + [
        Action("B", stage, micro_batch) for stage in reversed(stages) for micro_batch in reversed(range(m))
    ]


def _interleaved(pp: int, m: int, v: int, rank: int, *, zero_bubble: bool = False) -> list[Action]:
    """A round of about pp micro-batches passes the rank's first stage, then its second, ...; then the next round."""
    order = _Order(m)
    per_round = m // max(1, m // pp)
    total = v * m
    ahead = min(total, (v - 1) * per_round + (1 if zero_bubble else 2) * (pp - 1 - rank))

    def stage(number: int, *, backward: bool) -> int:
        local = number // per_round % v
        return (v - 1 - local if backward else local) * pp + rank

    for number in range(ahead):
        order.forward(stage(number, backward=False))
    for number in range(total):
        if ahead + number < total:
            order.forward(stage(ahead + number, backward=False))
        order.backward(stage(number, backward=True), whole=not zero_bubble)
        if number >= rank:
            order.weights()
    while order.owed:
        order.weights()
    return order.actions


def _interleaved_zero_bubble(pp: int, m: int, v: int, rank: int) -> list[Action]:
    return _interleaved(pp, m, v, rank, zero_bubble=True)


def _zbv(pp: int, m: int, v: int, rank: int) -> list[Action]:
    order = _Order(m)
    down, up = rank, 2 * pp - 1 - rank
    filled = max(2 * pp - 1, m)

    def backward(stage: int) -> None:
        order.backward(stage, whole=False)
        order.weights(stage)

    for _ in range(2 * (pp - rank) - 1):
        order.forward(down)
    for _ in range(rank):
        order.forward(up)
        order.forward(down)
    for _ in range(pp - rank):
        order.forward(up)
        backward(up)
    while order.forwards[up] < filled:
        if order.forwards[down] < filled:
            order.forward(down)
        backward(down)
        order.forward(up)
        backward(up)
    for _ in range(rank):
        order.backward(down, whole=False)
        order.backward(up, whole=False)
    for _ in range(pp - rank):
        backward(down)
    for stage in (up, down):
        while any(owed[0] == stage for owed in order.owed):
            order.weights(stage)
    return order.actions


def _dualpipev(pp: int, m: int, v: int, rank: int) -> list[Action]:
    order = _Order(m)
    down, up, after = rank, 2 * pp - 1 - rank, pp - 1 - rank
    for _ in range(2 * after):
        order.forward(down)
    for _ in range(rank + 1):
        order.forward(down)
        order.forward(up)
    for _ in range(after):
        order.backward(up, whole=False)
        order.weights()
        order.forward(up)
    for _ in range(m - 2 * pp + rank + 1):
        order.forward(down)
        order.backward(up)
        order.forward(up)
        order.backward(down)
    for _ in range(after):
        order.backward(up)
        order.forward(up)
        order.backward(down)
    half, odd = (rank + 1) // 2, rank % 2
    for number in range(rank + 1):
        # From the middle on, weight gradients are postponed and computed while the last input gradients are awaited.
        order.backward(up, whole=number < half + (1 - odd))
        order.backward(down, whole=number < half)
    for _ in range(after):
        order.weights()
        order.backward(down, whole=False)
    while order.owed:
        order.weights()
    return order.actions


_BUILDERS: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved_1f1b": _interleaved,
    "looped_bfs": _looped_bfs,
    "interleaved_zero_bubble": _interleaved_zero_bubble,
    "zbv_zero_bubble": _zbv,
    "dualpipev": _dualpipev,
}
