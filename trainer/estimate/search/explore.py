"""Every choice for a model on a cluster: each combination with its memory and its time.

    what is swept (sequence length, optimizer, precision ...)  x  the search's layouts, micro-batches and recompute

The rules of the trainer refuse some; the others get the estimate of `memory-estimate` and the step time of the search.
Torch-free, as far as the traces are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

from configs.choices import BYTES
from configs.errors import ConfigError, CookbookError
from configs.keys import value_at
from configs.schema import Config
from trainer.estimate.bounds import states_bytes
from trainer.estimate.estimate import Estimate, TargetDevice, estimate, planned_device
from trainer.estimate.search.candidates import Candidate, candidates
from trainer.estimate.search.cost import Dimensions, StepTime, step_time
from trainer.estimate.search.search import model_dimensions, with_global_batch
from trainer.estimate.tracing import NotEstimated
from trainer.make_plan import make_plan
from trainer.plan.devices import Gpu
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan

HOPELESS = 2.0
"""A combination whose states alone take this many times the device gets no estimate: its states are enough to know."""

Progress = Callable[[int, int], None]
"""Called with the combinations that are done and with all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of the busiest rank.

    parts: by component at its peak; their sum is the allocated memory.
    highest: the most that each component ever holds.
    reserved, device: lower and upper end.
    outside: CUDA context and NCCL."""

    parts: tuple[int, ...]
    highest: tuple[int, ...]
    reserved: tuple[int, int]
    device: tuple[int, int]
    outside: int
    host: int
    verdict: str
    peak: str

    @classmethod
    def of(cls, found: Estimate) -> Memory:
        rank = found.busiest
        return cls(
            parts=tuple(rank.components.values()),
            highest=tuple(rank.highest.values()),
            reserved=(rank.peak_reserved_bytes, rank.peak_reserved_most_bytes),
            device=(rank.device_bytes, rank.device_most_bytes),
            outside=found.context_bytes + found.nccl_bytes,
            host=rank.host_bytes,
            verdict=str(found.verdict),
            peak=f"{rank.peak_phase}, step {rank.peak_step}" + ("" if rank.kind == "all" else f" of {rank.kind}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One combination.

    refused: the lines of the rules; None: it can run.
    memory: None where only `states`, a lower bound in bytes, is known.
    fits: whether the upper end fits."""

    candidate: Candidate
    refused: str | None = None
    states: int = 0
    time: StepTime | None = None
    memory: Memory | None = None
    fits: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Explored:
    """One configuration with all its layouts. config: with the global batch filled in."""

    config: Config
    device: TargetDevice
    world_size: int
    points: tuple[Point, ...]


def explore(configs: Sequence[Config], machines: Sequence[Machine], progress: Progress) -> list[Explored]:
    """Every combination of each configuration. Raises ConfigError where there is nothing to combine, or where the
    model cannot be traced at all."""
    spaces: list[tuple[Config, Machine, int, list[Candidate]]] = []
    for config, machine in zip(configs, machines, strict=True):
        per_node = config.cluster.gpus_per_node or machine.gpus
        world_size = per_node * config.cluster.nodes
        config = with_global_batch(config, world_size)
        space = [*candidates(config, world_size=world_size, gpus_per_node=per_node)]
        spaces.append((config, machine, world_size, space))
    total, done = sum(len(space) for *_, space in spaces), 0
    found: list[tuple[Config, int, list[Point], TargetDevice | None]] = []
    for config, machine, world_size, space in spaces:
        points: list[Point] = []
        for point in _points(config, machine, space):
            points.append(point)
            done += 1
            progress(done, total)
        found.append((config, world_size, points, _device(config, machine, points)))
    known = next((device for *_, device in found if device is not None), None)
    if known is None:
        raise ConfigError(*dict.fromkeys(point.refused or "" for _, _, points, _ in found for point in points))
    return [
        Explored(config=config, device=device or known, world_size=world_size, points=tuple(points))
        for config, world_size, points, device in found
    ]


def check_open(config: Config) -> None:
    """Raises ConfigError where the command sets a swept value itself, or asks for another answer."""
    problems = [
        f"{key}: estimate.explore tries its values itself; leave it out, and give train.global_batch_size"
        for key in ("train.micro_batch_size", "train.gradient_accumulation_steps")
        if value_at(config, key) is not None
    ]
    problems += [
        f"{key}: estimate.explore writes its page alone; leave out one of the two"
        for key in ("estimate.search", "estimate.plot", "estimate.explain")
        if value_at(config, key)
    ]
    if problems:
        raise ConfigError(*problems)


def _device(config: Config, machine: Machine, points: Sequence[Point]) -> TargetDevice | None:
    """The layouts of one configuration; None where the rules refuse all of them."""
    for point in points:
        if point.refused is None:
            changed = point.candidate.apply(config)
            return planned_device(changed, make_plan(changed, machine))
    return None


def _points(config: Config, machine: Machine, space: Sequence[Candidate]) -> Iterator[Point]:
    try:
        size = model_dimensions(config, machine)
    except CookbookError as error:  # every other layout raises the same
        yield from (Point(candidate=candidate, refused="\n".join(error.problems)) for candidate in space)
        return
    for candidate in space:
        changed = candidate.apply(config)
        try:
            plan = make_plan(changed, machine)
            gpu = planned_device(changed, plan).gpu
            point = None if gpu is None else _point(candidate, changed, plan, size, gpu)
        except CookbookError as error:
            yield Point(candidate=candidate, refused="\n".join(error.problems))
            continue
        if point is None:
            raise ConfigError("estimate.explore: plans for GPUs; name them: cluster=8xh100, or cluster.gpu=...")
        yield point


def _point(candidate: Candidate, config: Config, plan: Plan, size: Dimensions, gpu: Gpu) -> Point:
    device = planned_device(config, plan)
    time = step_time(config, plan, size, gpu)
    frozen = size.frozen_bytes(BYTES[plan.param_dtype])
    states = int(states_bytes(plan, size.trained, config.optimizer, frozen=frozen))
    if states > HOPELESS * (device.capacity_bytes or inf):
        return Point(candidate=candidate, time=time, states=states)
    try:
        found = estimate(config, plan, heaviest=True)
    except NotEstimated:
        return Point(candidate=candidate, time=time, states=states)
    return Point(candidate=candidate, time=time, states=states, memory=Memory.of(found), fits=found.fits)
