"""A pipeline rank's step: its stages, the order of its actions, and the tensors that it keeps for its neighbours.

Everything is read from the tables that the trainer runs by: the stages of each rank (`pipeline.table`), the order
of its forwards and backwards (`pipeline.orders`), how many buffers torch sets aside for what neighbours send
(`pipeline.timeline.receive_buffers`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, partial
from operator import ge
from typing import Any

from configs.choices import BYTES
from configs.schema import Config
from trainer.axes import CONTEXT, PIPELINE
from trainer.axes.pipeline.orders import Action, rank_orders
from trainer.axes.pipeline.table import SCHEDULES, default_stages_per_rank, stages_of_rank
from trainer.axes.pipeline.timeline import receive_buffers
from trainer.estimate.compose import replay_stages
from trainer.estimate.layouts.common import Setting, step_inputs
from trainer.estimate.layouts.sharded import update_together
from trainer.estimate.layouts.staged import Staged
from trainer.estimate.profile import ModelProfile, Profile, role
from trainer.estimate.steady import Replayed, continued, repeats_only
from trainer.estimate.timeline import Handle, Timeline
from trainer.plan.plan import Plan


class PipelineRank:
    """What one pipeline rank holds and does. work: ranks of which it is equal need the same memory."""

    def __init__(self, config: Config, plan: Plan, model: ModelProfile, ranges: Sequence[range], rank: int) -> None:
        pipeline, pp, count = config.parallel.pipeline, plan.degree(PIPELINE), plan.batch.gradient_accumulation_steps
        self.plan, self.model, self.ranges, self.schedule = plan, model, ranges, pipeline.schedule
        self.config, self.place = config, rank
        self.optimizer = config.optimizer
        self.per_rank = pipeline.stages_per_rank or default_stages_per_rank(self.schedule)
        self.owned = stages_of_rank(self.schedule, pp=pp, rank=rank, stages_per_rank=self.per_rank)
        shape: dict[str, Any] = dict(schedule=self.schedule, pp=pp, stages_per_rank=pipeline.stages_per_rank)
        orders = shortest_orders if plan.device == "cuda" else _orders
        self.order = orders(**shape, micro_batches=count)[rank]
        self.buffers = _buffers(**shape, micro_batches=count)[rank]

    @property
    def work(self) -> Hashable:
        place = {stage: index for index, stage in enumerate(self.owned)}
        order = tuple((kind, place[stage], micro_batch) for kind, stage, micro_batch in self.order)
        return self._stages(), order, self.buffers

    def contains(self, other: PipelineRank) -> bool:
        """Whether this rank holds, at one moment or another, all that the other ever holds at once."""
        if self._stages() != other._stages() or self.buffers < other.buffers:
            return False
        mine = _states(self.order)
        return all(any(all(map(ge, held, state)) for held in mine) for state in _states(other.order) - mine)

    def replay(self, begin: Callable[[], Timeline]) -> tuple[Timeline, Setting]:
        """Two steps on a timeline that begins so. The setting knows what lies in host memory."""
        timeline, count = begin(), self.plan.batch.gradient_accumulation_steps
        if timeline.cuts_exactly and repeats_only(self.order, count):
            found = continued(partial(self._shortened, begin), count)
            if found is not None:
                return found
        return timeline, self._replay(timeline)

    def _shortened(self, begin: Callable[[], Timeline], count: int) -> Replayed:
        plan = replace(self.plan, batch=replace(self.plan.batch, gradient_accumulation_steps=count))
        rank, timeline = PipelineRank(self.config, plan, self.model, self.ranges, self.place), begin()
        setting = rank._replay(timeline)
        return Replayed(order=rank.order, timeline=timeline, setting=setting)

    def _replay(self, timeline: Timeline) -> Setting:
        exchanged = SCHEDULES[self.schedule].arrangement != "v"
        settings: list[Setting] = []
        modules: dict[int, tuple[Profile, Staged]] = {}
        for stage in self.owned:
            profile = self.model.stage(self.ranges[stage], stages=len(self.ranges), index=stage)
            host = settings[0].host if settings else {}
            settings.append(self._setting(profile, timeline, host))
            modules[stage] = (profile, Staged(settings[-1], ahead=self.per_rank > 1, exchanged=exchanged))
        settings[0].place_batch()
        replay_stages(
            modules,
            self.order,
            timeline,
            inputs=step_inputs(self.plan, first=0 in modules, last=len(self.ranges) - 1 in modules),
            neighbours=_Neighbours(self, timeline, gpu=settings[0].gpu),
            update=partial(update_together, [layout for _, layout in modules.values()]),
        )
        return settings[0]

    def _setting(self, profile: Profile, timeline: Timeline, host: dict[str, int]) -> Setting:
        return Setting(profile=profile, plan=self.plan, optimizer=self.optimizer, timeline=timeline, host=host)

    def crosses(self, stage: int) -> bool:
        """Whether a stage's input comes from another rank."""
        return stage > 0 and stage - 1 not in self.owned

    def _stages(self) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
        """Of each stage: its role, its layers' kinds, and whether the next one is here too."""
        return tuple(
            (role(stages=len(self.ranges), index=stage), self._kinds(stage), stage + 1 in self.owned)
            for stage in self.owned
        )

    def _kinds(self, stage: int) -> tuple[int, ...]:
        layers = self.ranges[stage]
        return self.model.anatomy.layers[layers.start : layers.stop]


_orders, _buffers = cache(rank_orders), cache(receive_buffers)
"""Of all ranks; each of them asks."""


@cache
def shortest_orders(
    schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int | None
) -> list[Sequence[Action]]:
    """The order of each rank's actions in a step with the fewest micro-batches that pass through all states of a whole
    step. The micro-batches that follow when the pipeline is full add no state."""
    shape: dict[str, Any] = dict(schedule=schedule, pp=pp, stages_per_rank=stages_per_rank)
    orders: list[Sequence[Action]] = list(rank_orders(**shape, micro_batches=micro_batches))
    wanted = {rank: _states(order) for rank, order in enumerate(orders)}
    most = {rank: max(map(max, states)) for rank, states in wanted.items()}  # of one stage's micro-batches at once
    # Interleaved schedules run in rounds; the short step must consist of whole rounds too.
    rounds = pp if SCHEDULES[schedule].arrangement == "loop" and micro_batches % pp == 0 else 1
    for fewer in range(rounds, micro_batches, rounds):
        asked = [rank for rank in wanted if most[rank] <= fewer]
        if asked:
            shorter = rank_orders(**shape, micro_batches=fewer)
            for rank in asked:
                if _states(shorter[rank]) == wanted[rank]:
                    orders[rank] = shorter[rank]
                    del wanted[rank]
    return orders


def _states(order: Sequence[Action]) -> set[tuple[int, ...]]:
    """The states of a rank after each of its actions. For each of its stages: the number of micro-batches whose
    activations it holds, the further ones whose activations the weights' gradients need, and whether there are
    gradients."""
    place = {stage: 3 * index for index, stage in enumerate(dict.fromkeys(action.stage for action in order))}
    held, found = [0] * (3 * len(place)), set()
    for kind, stage, _ in order:
        at = place[stage]
        if kind == "F":
            held[at] += 1
        elif kind == "W":
            held[at + 1] -= 1
        else:
            held[at] -= 1
            held[at + 1] += kind == "I"
        if kind in "BW":
            held[at + 2] = 1
        found.add(tuple(held))
    return found


class _Neighbours:
    """Fulfils `compose.Neighbours`: hidden states and their gradients at the borders of this rank's stages.

    waiting: the buffers that are set aside for good. keeps_sent: how many of the tensors that have been sent stay.
    torch's engine waits for its sends at the end of a step (1f1b: at the next one), and gloo keeps the tensors until
    then; NCCL gives them back when they have left.
    """

    def __init__(self, rank: PipelineRank, timeline: Timeline, *, gpu: bool) -> None:
        batch, plan = rank.plan.batch, rank.plan
        hidden = batch.micro_batch_size * (batch.seq_len // plan.degree(CONTEXT)) * rank.model.outline.hidden_size
        all_sent = 1 if rank.schedule == "1f1b" else batch.gradient_accumulation_steps * len(rank.ranges)
        self.rank, self.timeline, self.size = rank, timeline, hidden * BYTES[plan.param_dtype]
        self.keeps_sent = 0 if gpu else all_sent
        self.waiting = [timeline.allocate("buffers", self.size) for _ in range(rank.buffers)]
        self.sent: list[Handle | None] = []
        self.gradients: dict[tuple[int, int], Handle | None] = {}

    def after(self, action: Action) -> None:
        kind, stage, micro_batch = action
        if kind in "BW" and stage < len(self.rank.ranges) - 1 and stage + 1 not in self.rank.owned:
            self._keep()
        if kind in "BI" and self.rank.crosses(stage):
            if kind == "I" and not self.keeps_sent:
                # Until the gradient of the weights is there, the buffer's `.grad` holds it.
                self.gradients[stage, micro_batch] = self.timeline.allocate("buffers", self.size)
            else:
                self._keep()
        if kind == "W" and (gradient := self.gradients.pop((stage, micro_batch), None)) is not None:
            self.timeline.free(gradient)

    def _keep(self) -> None:
        if len(self.sent) < self.keeps_sent:
            self.sent.append(self.timeline.allocate("buffers", self.size))

    def end_step(self) -> None:
        self.timeline.free_all(self.sent)
