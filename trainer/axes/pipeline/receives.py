"""When a pipeline rank posts its receives, and the number of buffers that they take.

torch's engine for several stages per rank (`torch.distributed.pipelining`) posts a receive as soon as the sender has
finished, in a simulation in which the ranks take turns; an input may arrive long before its forward. This module
repeats the simulation without torch, and the tests compare: the estimator counts the buffers that `pipeline.run` takes.

    rank 1 of 2, interleaved_1f1b      RF0 F0 RF1 F1 RF2 ...      RF: a stage's input, RB: the gradient of its output
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cache

from packaging.version import Version

from configs.packages import installed
from trainer.axes.pipeline.orders import Action, rank_orders
from trainer.axes.pipeline.table import rank_of_stage

Turn = tuple[Action, ...]
"""A rank's work in one turn of the simulation: nothing, an action, or a forward and a backward at once."""

ACTIVE = 3
"""Stages of a rank whose parameters torch's engine keeps gathered. Gathering or freeing one takes a turn."""


def with_receives(schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int) -> list[list[Action]]:
    """The order of each rank (`rank_orders`) with its receives, for schedules with several stages per rank."""
    orders = rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages_per_rank)
    last = pp * stages_per_rank - 1
    waiting = [deque(_turns(schedule, order, rank, pp, micro_batches)) for rank, order in enumerate(orders)]
    posted: list[list[Action]] = [[] for _ in orders]
    done: list[set[Action]] = [set() for _ in orders]
    while left := sum(map(len, waiting)):
        for rank, turns in enumerate(waiting):
            if not turns or not all(_ready(action, done[rank], last) for action in turns[0]):
                continue
            for action in turns.popleft():
                posted[rank].append(action)
                done[rank].add(action)
                receive = _receive(action, last)
                peer = rank_of_stage(schedule, pp=pp, stage=receive.stage) if receive else rank
                if receive and peer != rank:
                    posted[peer].append(receive)
                    done[peer].add(receive)
        assert sum(map(len, waiting)) < left, f"{schedule}: all ranks wait"  # an estimate must not hang
    return posted


def most_received(order: Sequence[Action]) -> int:
    """Number of buffers that a rank needs for an order with receives: the maximum of inputs in use at once, and of
    gradients. Both stay in use until the micro-batch's backward through the stage is complete."""
    used: Counter[str] = Counter()
    most: Counter[str] = Counter()
    received = {action for action in order if action.kind in ("RF", "RB")}
    for kind, stage, micro_batch in order:
        if kind in ("RF", "RB"):
            used[kind] += 1
            most[kind] = max(most[kind], used[kind])
        elif kind in "BW":
            for arrived in ("RF", "RB"):
                used[arrived] -= Action(arrived, stage, micro_batch) in received
    return most.total()


@cache
def _reducing() -> int:
    """Turns that the reduction of a stage's gradients takes. torch 2.15 waits for it in a second one."""
    return 2 if Version(installed("torch") or "0") >= Version("2.15") else 1


def _turns(schedule: str, order: Sequence[Action], rank: int, pp: int, micro_batches: int) -> Iterator[Turn]:
    """An order as torch's engine runs it: with the turns in which it gathers, frees and reduces parameters."""
    turns = list(_together(order, alone=rank == pp - 1) if schedule == "dualpipev" else ((one,) for one in order))
    held: set[int] = set()
    through: Counter[int] = Counter()
    for turn, following in zip(turns, _following(turns), strict=True):
        wanted = set(following[:ACTIVE])
        yield from [()] * len(held ^ wanted)
        held = wanted
        yield turn
        for kind, stage, _ in turn:
            through[stage] += kind in "BW"
            if kind in "BW" and through[stage] == micro_batches:
                yield from [()] * _reducing()


def _together(order: Sequence[Action], *, alone: bool) -> Iterator[Turn]:
    """DualPipeV runs a forward and the following whole backward in one turn. alone: except for the first pair."""
    index = 0
    while index < len(order):
        pair = tuple(order[index : index + 2])
        if [action.kind for action in pair] == ["F", "B"]:
            yield from [(action,) for action in pair] if alone else [pair]
            alone, index = False, index + 2
        else:
            yield pair[:1]
            index += 1


def _following(turns: Sequence[Turn]) -> list[list[int]]:
    """For each turn the stages from it on, in the order of their use."""
    found: list[list[int]] = []
    upcoming: list[int] = []
    for turn in reversed(turns):
        for _, stage, _ in reversed(turn):
            upcoming = [stage, *(other for other in upcoming if other != stage)]
        found.append(upcoming)
    return found[::-1]


def _ready(action: Action, done: set[Action], last: int) -> bool:
    """Whether an action's input from another stage has arrived, or is on its way."""
    kind, stage, micro_batch = action
    if kind == "F" and stage > 0:
        return bool(done & {Action("RF", stage, micro_batch), Action("F", stage - 1, micro_batch)})
    if kind in "BI" and stage < last:
        return bool(
            done & {Action("RB", stage, micro_batch), *(Action(whole, stage + 1, micro_batch) for whole in "BI")}
        )
    return True


def _receive(action: Action, last: int) -> Action | None:
    """The receive that matches an action's send, unless both are on one rank."""
    kind, stage, micro_batch = action
    if kind == "F" and stage < last:
        return Action("RF", stage + 1, micro_batch)
    return Action("RB", stage - 1, micro_batch) if kind in "BI" and stage > 0 else None
