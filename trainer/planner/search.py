"""The search: every candidate's time, then memory from the fastest down, until enough fit.

Time is arithmetic and asked of all; memory needs a trace of the model's code at that shape and is asked only of layouts
that could be among the first. What needs more than something that does not fit is not asked. Torch-free, as far as the
traces are on disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.errors import ConfigError, CookbookError
from configs.schema import Checkpointing, Config
from trainer.machine import Machine
from trainer.memory.estimate import Estimate, estimate, planned_device
from trainer.memory.profiles import NotEstimated, get_profile
from trainer.plan import Plan, make_plan
from trainer.planner.candidates import Candidate, candidates
from trainer.planner.cost import Dimensions, StepTime, dimensions, step_time
from trainer.rules import config_fields

SHOWN = 5
TOKENS_PER_STEP = 2**22
"""What a step takes where the command does not say it: 4 Mi tokens, usual for models of 8B to 70B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A layout with its predicted time and memory."""

    candidate: Candidate
    plan: Plan
    time: StepTime
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """best: the fastest that fit, each layout once, with its best micro-batch and recompute. too_large: layouts that
    might be faster and do not fit, each at the shape that needs least. timed: plans that the trainer can run. asked:
    how many estimates were made. config: what was searched, with the global batch filled in."""

    config: Config
    best: Sequence[Found]
    too_large: Sequence[Found]
    timed: int
    asked: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timed:
    candidate: Candidate
    config: Config
    plan: Plan
    time: StepTime


def search(config: Config, machine: Machine) -> Search:
    """Rank the layouts of a cluster. Raises ConfigError where the search has nothing to work on, NotEstimated where the
    model cannot be traced."""
    if config.train.micro_batch_size is not None or config.train.gradient_accumulation_steps is not None:
        raise ConfigError(
            "estimate.search=true: chooses train.micro_batch_size and train.gradient_accumulation_steps itself;"
            " leave them out, and give train.global_batch_size"
        )
    gpus_per_node = config.cluster.gpus_per_node or machine.gpus
    world_size = gpus_per_node * config.cluster.nodes
    config = _with_global_batch(config, world_size)
    size, gpu = _dimensions(config, machine), None
    timed: list[_Timed] = []
    for candidate in candidates(config, world_size=world_size, gpus_per_node=gpus_per_node):
        changed = candidate.apply(config)
        try:
            plan = make_plan(changed, machine)
        except CookbookError:
            continue
        gpu = gpu or planned_device(changed, plan).gpu
        if gpu is None:
            raise ConfigError("estimate.search=true: plans for GPUs; name them: cluster=8xh100, or cluster.gpu=...")
        timed.append(_Timed(candidate=candidate, config=changed, plan=plan, time=step_time(changed, plan, size, gpu)))
    timed.sort(key=lambda one: one.time.total)
    return _fitting(config, timed)


def _fitting(config: Config, timed: Sequence[_Timed]) -> Search:
    """timed: fastest first."""
    layouts: dict[tuple[str, ...], list[_Timed]] = defaultdict(list)
    for one in timed:
        layouts[one.candidate.layout].append(one)
    best: list[Found] = []
    too_large: list[Found] = []
    asked = 0
    for shapes in layouts.values():  # in the order of their fastest shape
        if len(best) == SHOWN and shapes[0].time.total >= best[-1].time.total:
            break
        answers = _ask_until_one_fits(shapes)
        asked += len(answers)
        if answers and answers[-1].estimate.fits:
            best = sorted([*best, answers[-1]], key=lambda found: found.time.total)[:SHOWN]
        elif answers:
            too_large.append(answers[0])
    return Search(config=config, best=best, too_large=too_large, timed=len(timed), asked=asked)


def _ask_until_one_fits(shapes: Sequence[_Timed]) -> list[Found]:
    """The estimates that were made of one layout's shapes (fastest first); the last one fits if any does. Begins with
    the shape that needs least: where that does not fit, the others need not be asked."""
    least = min(shapes, key=_appetite)
    answers = _ask(least)
    if not answers or not answers[0].estimate.fits:
        return answers
    refused: dict[int, int] = {}  # by recompute: the smallest micro-batch that does not fit
    for one in shapes:
        recompute, size = _appetite(one)
        if size >= refused.get(recompute, size + 1):
            continue
        again = answers[:1] if one is least else _ask(one)
        answers += again
        if again and again[0].estimate.fits:
            break
        refused[recompute] = size
    return answers


def _appetite(one: _Timed) -> tuple[int, int]:
    """Orders the shapes of a layout by the memory that they need."""
    order = (Checkpointing.full, Checkpointing.selective, Checkpointing.none)
    return order.index(one.config.train.activation_checkpointing), one.plan.batch.micro_batch_size


def _ask(one: _Timed) -> list[Found]:
    """Its estimate; none where memory cannot be told."""
    try:
        return [Found(candidate=one.candidate, plan=one.plan, time=one.time, estimate=estimate(one.config, one.plan))]
    except NotEstimated:
        return []


def _with_global_batch(config: Config, world_size: int) -> Config:
    """Layouts compare at the same batch alone."""
    if config.train.global_batch_size is not None:
        return config
    sequences = max(1, TOKENS_PER_STEP // config.data.seq_len)
    whole = -(-sequences // world_size) * world_size
    return replace(config, train=replace(config.train, global_batch_size=whole))


def _dimensions(config: Config, machine: Machine) -> Dimensions:
    """The model's sizes, counted from its own modules."""
    fields = config_fields(config)
    if not (fields.get("hidden_size") or fields.get("n_embd")) or "vocab_size" not in fields:
        raise ConfigError(
            f"model={config.model.preset}: estimate.search=true needs hidden_size and vocab_size from the model's"
            " config; give a preset, a local folder, or model.config.hidden_size and model.config.vocab_size"
        )
    plain = Candidate("single", {"cluster.nodes": 1, "cluster.gpus_per_node": 1, "train.micro_batch_size": 1})
    alone = plain.apply(replace(config, train=replace(config.train, global_batch_size=1)))
    plan = make_plan(alone, machine)
    return dimensions(fields, get_profile(alone, plan, planned_device(alone, plan).gpu).anatomy)
