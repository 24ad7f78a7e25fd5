"""The search: every candidate's time, then memory from the fastest down, until enough fit.

Time and the bytes of states are arithmetic, computed for all candidates. Memory needs a trace of the model's code at
that shape: only shapes that could be among the first are traced, and none that needs more than one that is known to be
too large. Torch-free, as far as the traces are on disk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from configs import waiting
from configs.choices import BYTES, Checkpointing, EngineName
from configs.errors import ConfigError, CookbookError, PlanError
from configs.schema import Config
from trainer.axes import CONTEXT, EXPERTS, TENSOR
from trainer.estimate.bounds import states_bytes
from trainer.estimate.estimate import Estimate, estimate, planned_device
from trainer.estimate.profiles import get_outline
from trainer.estimate.search.candidates import Candidate, candidates, nearest
from trainer.estimate.search.cost import Dimensions, StepTime, dimensions, step_time
from trainer.estimate.tracing import NotEstimated
from trainer.estimate.verdict import ABOVE, Verdict
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.model_fields import config_fields, sizes
from trainer.plan.plan import Plan

SHOWN = 5
ALIKE = 0.8
"""Lower bound when a layout's memory beyond its states is transferred to another with the same sharding."""
GROWING = ("activations", "loss", "workspace")
RECOMPUTE = (Checkpointing.full, Checkpointing.selective, Checkpointing.none)
TOKENS_PER_STEP = 2**22
"""Tokens of a step where the command does not set them: 4 Mi tokens, usual for models of 8B to 70B."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A layout with its predicted time and memory."""

    candidate: Candidate
    plan: Plan
    time: StepTime
    estimate: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The result of a search.

    best: the fastest layouts that fit (or, if none does, that are tight), each once, with its best micro-batch and
        recompute.
    too_large: the layout that would be faster than all of them and is tight or does not fit, at the shape that needs
        least; None: there is none.
    timed: number of plans that the trainer can run and whose states fit.
    asked: number of estimates made.
    config: the configuration searched, with the global batch filled in.
    size: parameters of the model."""

    config: Config
    best: Sequence[Ranked]
    too_large: Ranked | None
    timed: int
    asked: int
    size: Dimensions


@dataclass(frozen=True, kw_only=True, slots=True)
class _Timed:
    """states: `states_bytes`. capacity: of the device."""

    candidate: Candidate
    config: Config
    plan: Plan
    time: StepTime
    states: float
    capacity: float

    @property
    def size(self) -> int:
        return self.plan.batch.micro_batch_size

    @property
    def recompute(self) -> Checkpointing:
        return self.config.train.activation_checkpointing

    @property
    def pieces(self) -> tuple[object, ...]:
        """The part of the plan that decides a rank's activations. A pipeline's first rank holds a micro-batch of
        each stage: as many layers as there are without a pipeline."""
        cast = self.plan.fully_sharded or self.plan.engine is EngineName.deepspeed
        return (self.plan.degree(TENSOR), self.plan.degree(CONTEXT), self.plan.degree(EXPERTS), cast, self.recompute)


@waiting.on("searching")
def search(config: Config, machine: Machine) -> Search:
    """Rank the layouts of a cluster. Raises ConfigError where there is nothing to search, NotEstimated where the
    model cannot be traced."""
    if config.train.micro_batch_size is not None or config.train.gradient_accumulation_steps is not None:
        raise ConfigError(
            "estimate.search=true: chooses train.micro_batch_size and train.gradient_accumulation_steps itself;"
            " leave them out, and give train.global_batch_size"
        )
    gpus_per_node = config.cluster.gpus_per_node or machine.gpus
    world_size = gpus_per_node * config.cluster.nodes
    config = with_global_batch(config, world_size)
    size, gpu = model_dimensions(config, machine), None
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
        capacity = planned_device(changed, plan).capacity_bytes or inf
        frozen = size.frozen_bytes(BYTES[plan.param_dtype])
        states = states_bytes(plan, size.trained, config.optimizer, frozen=frozen)
        if states < capacity:
            time = step_time(changed, plan, size, gpu)
            timed.append(
                _Timed(candidate=candidate, config=changed, plan=plan, time=time, states=states, capacity=capacity)
            )
    timed.sort(key=lambda one: one.time.total)
    return _fitting(config, timed, size)


def speed_of(config: Config, machine: Machine) -> float:
    """Tokens per second and GPU of one configuration; 0.0 where it cannot run or does not fit. Raises ConfigError where
    no GPU is named, or the model's sizes are not known."""
    size = model_dimensions(config, machine)
    try:
        plan = make_plan(config, machine)
    except PlanError:
        return 0.0
    device = planned_device(config, plan)
    if device.gpu is None:
        raise ConfigError("predicted_speed: plans for GPUs; name them: cluster=8xh100, or cluster.gpu=...")
    if not estimate(config, plan).fits:
        return 0.0
    return step_time(config, plan, size, device.gpu).tokens_per_second_per_gpu


@dataclass(frozen=True, kw_only=True, slots=True)
class _Beyond:
    """Bytes of a rank in addition to its states. growing: those that grow with the micro-batch."""

    fixed: float
    growing: float


class _Questions:
    """The estimates and their conclusions: in addition to its states a rank needs much the same memory under every
    layout that computes the same pieces, so one estimate answers for many shapes."""

    def __init__(self, timed: Sequence[_Timed]) -> None:
        self.answers: dict[tuple[str, ...], Ranked | None] = {}
        self.beyond: dict[tuple[object, ...], dict[int, _Beyond]] = defaultdict(dict)
        self.smallest: dict[tuple[object, ...], _Timed] = {}
        for one in sorted(timed, key=lambda each: -each.size):
            self.smallest[one.candidate.layout, one.recompute] = one

    def judged(self, one: _Timed, wanted: Verdict) -> Ranked | None:
        """The estimate, if it has that verdict. It is not made where a smaller shape of its kind is known to be too
        large."""
        if one.pieces not in self.beyond:
            self.ask(self.smallest[one.candidate.layout, one.recompute])
        known = self.beyond[one.pieces].items()
        needs = [more.fixed + more.growing * one.size / size for size, more in known if size <= one.size]
        least = one.states + ALIKE * max(needs, default=0.0)
        if wanted is Verdict.fits:
            least *= ABOVE[one.config.cluster.expandable_segments]
        if least > one.capacity:
            return None
        found = self.ask(one)
        return found if found is not None and found.estimate.verdict is wanted else None

    def ask(self, one: _Timed) -> Ranked | None:
        """The estimate of a shape, made once; None where memory cannot be estimated."""
        if one.candidate.overrides not in self.answers:
            with waiting.on(f"searching: {len(self.answers)} estimates so far"):
                self.answers[one.candidate.overrides] = self._estimate(one)
        return self.answers[one.candidate.overrides]

    def _estimate(self, one: _Timed) -> Ranked | None:
        try:
            predicted = estimate(one.config, one.plan, heaviest=True)
        except NotEstimated:
            return None
        growing = sum(predicted.busiest.components[name] for name in GROWING)
        more = _Beyond(fixed=predicted.busiest.device_bytes - one.states - growing, growing=growing)
        known = self.beyond[one.pieces]
        known[one.size] = min(more, known.get(one.size, more), key=lambda each: each.fixed + each.growing)
        return Ranked(candidate=one.candidate, plan=one.plan, time=one.time, estimate=predicted)


def _fitting(config: Config, timed: Sequence[_Timed], size: Dimensions) -> Search:
    """timed: fastest first."""
    questions = _Questions(timed)
    best = _best(timed, questions, Verdict.fits) or _best(timed, questions, Verdict.tight)
    return Search(
        config=config,
        best=list(best.values()),
        too_large=_fastest_too_large(timed, best, questions),
        timed=len(timed),
        asked=len(questions.answers),
        size=size,
    )


def _best(timed: Sequence[_Timed], questions: _Questions, wanted: Verdict) -> dict[tuple[str, ...], Ranked]:
    """The fastest shape of each of the fastest layouts, of those with this verdict."""
    best: dict[tuple[str, ...], Ranked] = {}
    for one in timed:
        if len(best) == SHOWN:
            break
        if one.candidate.layout not in best and (found := questions.judged(one, wanted)) is not None:
            best[one.candidate.layout] = found
    return best


def _fastest_too_large(
    timed: Sequence[_Timed], best: Mapping[tuple[str, ...], Ranked], questions: _Questions
) -> Ranked | None:
    """The layout that would be the fastest if it fitted, at the shape that needs least, if that does not fit either."""
    layout = next((one.candidate.layout for one in timed), None)
    if layout is None or layout in best:
        return None
    shapes = [one for one in timed if one.candidate.layout == layout]
    found = questions.ask(min(shapes, key=lambda one: (RECOMPUTE.index(one.recompute), one.size)))
    return found if found is not None and not found.estimate.fits else None


def with_global_batch(config: Config, world_size: int) -> Config:
    """The configuration with the batch fixed: layouts compare at the same batch alone."""
    if config.train.global_batch_size is not None:
        return config
    sequences = max(1, TOKENS_PER_STEP // config.data.seq_len)
    whole = -(-sequences // world_size) * world_size
    return replace(config, train=replace(config.train, global_batch_size=whole))


def model_dimensions(config: Config, machine: Machine) -> Dimensions:
    """The model's sizes, counted from its own modules."""
    fields = config_fields(config)
    if not (sizes(fields).hidden and sizes(fields).vocabulary):
        raise ConfigError(
            f"model={config.model.preset}: estimate.search=true needs hidden_size and vocab_size from the model's"
            " config; give a preset, a local folder, or model.config.hidden_size and model.config.vocab_size"
        )
    plain = nearest({}, {"cluster.nodes": 1, "cluster.gpus_per_node": 1, "train.micro_batch_size": 1})
    alone = plain.apply(replace(config, train=replace(config.train, global_batch_size=1)))
    plan = make_plan(alone, machine)
    return dimensions(fields, get_outline(alone, plan), config.optimizer)
