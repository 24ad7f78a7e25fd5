"""Pipeline tables: which rank holds which stage, which stage which layers, and which models cannot be split that way.

A stage is a run of neighbouring decoder layers; the first also holds the embedding, the last the final norm and the
head. Two stages per rank make each stage shorter, so ranks wait less at the start and the end of a step:

    8 layers, 2 ranks    one stage per rank    two, in a loop             two, in a V
    rank 0               0 1 2 3 . . . .       0 1 . . 4 5 . .            0 1 . . . . 6 7
    rank 1               . . . . 4 5 6 7       . . 2 3 . . 6 7            . . 2 3 4 5 . .
                         gpipe                 interleaved_1f1b           zbv_zero_bubble
                         1f1b                  looped_bfs                 dualpipev
                                               interleaved_zero_bubble

In a V the loss is computed on the embedding's rank, and one border between stages (3 | 4) needs no communication.
Torch-free: the plan, the estimator and the trainer read the same numbers here. Next: `orders`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleFacts:
    """arrangement: placement of stages on ranks: `one` each, `loop` or `v`. splits_backward: whether the gradients of
    the input and of the weights are computed separately, the latter later, when the rank would wait."""

    arrangement: str
    splits_backward: bool = False


SCHEDULES: dict[str, ScheduleFacts] = {
    "gpipe": ScheduleFacts(arrangement="one"),
    "1f1b": ScheduleFacts(arrangement="one"),
    "interleaved_1f1b": ScheduleFacts(arrangement="loop"),
    "looped_bfs": ScheduleFacts(arrangement="loop"),
    "interleaved_zero_bubble": ScheduleFacts(arrangement="loop", splits_backward=True),
    "zbv_zero_bubble": ScheduleFacts(arrangement="v", splits_backward=True),
    "dualpipev": ScheduleFacts(arrangement="v", splits_backward=True),
}


def default_stages_per_rank(schedule: str) -> int:
    return 1 if SCHEDULES[schedule].arrangement == "one" else 2


def stages_of_rank(schedule: str, *, pp: int, rank: int, stages_per_rank: int) -> tuple[int, ...]:
    """Global indices of the stages that pipeline rank `rank` holds, ascending."""
    if SCHEDULES[schedule].arrangement == "v":
        return rank, 2 * pp - 1 - rank
    return tuple(range(rank, pp * stages_per_rank, pp))


def rank_of_stage(schedule: str, *, pp: int, stage: int) -> int:
    if SCHEDULES[schedule].arrangement == "v" and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def split_layers(
    num_layers: int,
    stages: int,
    *,
    embedding_cost: float = 0.0,
    head_cost: float = 0.0,
    layer_costs: Sequence[float] | None = None,
    split: Sequence[int] | None = None,
) -> list[range]:
    """Layers of each stage, in order: the split under which the most expensive stage is cheapest.

    Costs are in units of a layer. The step runs at the pace of the slowest stage, so time counts: multiply-adds per
    token, which for a matrix is its number of entries. An embedding lookup costs none; a head of 128,000 entries costs
    as much as two or three layers. Among equal splits the later stages get more layers: they hold fewer micro-batches.
    layer_costs: one per layer if layers differ. split: number of layers per stage; overrides the balance. Raises
    ValueError for fewer layers than stages, or a split that `check_split` refuses.
    """
    if split is not None:
        problems = list(check_split(num_layers, stages, split))
        if problems:
            raise ValueError(problems[0])
        ends = list(accumulate(split))
    else:
        if num_layers < stages:
            raise ValueError(f"{num_layers} layers cannot be cut into {stages} stages of at least one layer")
        costs = list(layer_costs) if layer_costs is not None else [1.0] * num_layers
        ends = _balanced_ends(costs, stages, embedding_cost, head_cost)
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _balanced_ends(costs: Sequence[float], stages: int, embedding_cost: float, head_cost: float) -> list[int]:
    """The end of each stage. best[end] is, for the stages so far and the first `end` layers: (the largest cost of a
    stage, the sum of squares that prefers an even spread of the rest, the ends)."""
    upto = [0.0, *accumulate(costs)]
    # An optimal stage is never more than one layer above the average; longer ones are not tried.
    bound = (upto[-1] + embedding_cost + head_cost) / stages + max(costs) + embedding_cost + head_cost
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        extra = (embedding_cost if stage == 0 else 0.0) + (head_cost if stage == stages - 1 else 0.0)
        left = stages - 1 - stage  # each later stage needs a layer
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for begin, (largest, squares, ends) in best.items():
            for end in range(begin + 1, len(costs) + 1 - left) if left else (len(costs),):
                cost = upto[end] - upto[begin] + extra
                if cost > bound:
                    break
                # Rounded: sums of equal costs in another order must compare as equal.
                key = (round(max(largest, cost), 9), round(squares + cost * cost, 9))
                if end not in longer or key < longer[end][:2]:
                    longer[end] = (*key, [*ends, end])
        best = longer
    return best[len(costs)][2]


def check_pipeline(
    *,
    pp: int,
    schedule: str,
    micro_batches: int,
    stages_per_rank: int | None = None,
    num_layers: int | None = None,
    split: Sequence[int] | None = None,
    checkpointing: str = "none",
    compile: bool = False,
) -> Iterator[str]:
    """Every reason why this pipeline cannot run, one line each. num_layers: None if it is not known yet.

    micro_batches: number per step, `train.gradient_accumulation_steps`.
    """
    if schedule not in SCHEDULES:
        yield f"parallel.pipeline.schedule={schedule}: no such schedule; use one of {', '.join(SCHEDULES)}"
        return
    facts = SCHEDULES[schedule]
    per_rank = stages_per_rank if stages_per_rank is not None else default_stages_per_rank(schedule)
    stages = pp * per_rank
    yield from _check_arrangement(schedule, per_rank)
    yield from _check_micro_batches(schedule, pp, micro_batches)
    if num_layers is not None:
        if num_layers < stages:
            yield (
                f"parallel.pp={pp}: the model has {num_layers} layers, {pp} ranks x {per_rank} stage(s) per rank need"
                f" at least {stages}; use fewer ranks, or parallel.pipeline.schedule=1f1b with one stage per rank"
            )
        elif split is not None:
            yield from check_split(num_layers, stages, split)
    if facts.splits_backward and checkpointing == "selective":
        yield (
            f"train.activation_checkpointing=selective: {schedule} runs the backward of a layer in two passes, and what"
            " selective checkpointing recomputes can be used only once; use full or none, or"
            " parallel.pipeline.schedule=1f1b"
        )
    if facts.splits_backward and compile:
        yield (
            f"train.compile=true: {schedule} runs the backward of a layer in two passes, and a compiled layer has only"
            " one; use train.compile=false, or parallel.pipeline.schedule=1f1b"
        )


def check_split(num_layers: int, stages: int, split: Sequence[int]) -> Iterator[str]:
    """Why `parallel.pipeline.split` does not divide this model into these stages."""
    shown = f"parallel.pipeline.split={list(split)}"
    if len(split) != stages:
        yield f"{shown}: has {len(split)} entries, there are {stages} stages; give one number of layers per stage"
    elif min(split) < 1:
        yield f"{shown}: a stage without a layer has nothing to compute; give every stage at least 1"
    elif sum(split) != num_layers:
        yield f"{shown}: adds up to {sum(split)} layers, the model has {num_layers}"


def _check_arrangement(schedule: str, per_rank: int) -> Iterator[str]:
    shown = f"parallel.pipeline.stages_per_rank={per_rank}"
    match SCHEDULES[schedule].arrangement:
        case "one" if per_rank != 1:
            yield f"{shown}: {schedule} has one stage per rank; use 1, or parallel.pipeline.schedule=interleaved_1f1b"
        case "v" if per_rank != 2:
            yield f"{shown}: {schedule} has exactly two stages per rank; use 2"
        case "loop" if per_rank < 2:
            yield f"{shown}: {schedule} needs two or more stages per rank; use 2, or parallel.pipeline.schedule=1f1b"
        case _:
            pass


def _check_micro_batches(schedule: str, pp: int, micro_batches: int) -> Iterator[str]:
    shown = f"train.gradient_accumulation_steps={micro_batches}"
    if schedule == "1f1b" and micro_batches < pp:
        yield f"{shown}: {schedule} over {pp} stages needs as many micro-batches per step; use {pp} or more"
    elif schedule == "dualpipev" and micro_batches < 2 * pp:
        least = 2 * pp
        yield f"{shown}: {schedule} over {least} stages needs as many micro-batches per step; use {least} or more"
    elif schedule in ("interleaved_1f1b", "interleaved_zero_bubble"):
        rounds = max(1, micro_batches // pp)
        if micro_batches % rounds:
            yield (
                f"{shown}: {schedule} over {pp} ranks sends micro-batches in {rounds} equal rounds;"
                f" use {rounds * pp} or {(rounds + 1) * pp}"
            )
