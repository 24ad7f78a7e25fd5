"""A pipeline rank's step: its stages, what it does in which order, what it keeps for its neighbours.

Everything is read from the tables that the trainer runs by: which rank holds which stages (`pipeline_table`), the order
of its forwards and backwards (`pipeline_orders`), how many buffers torch sets aside for what neighbours send
(`pipeline_timeline.receive_buffers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from configs.schema import Config
from trainer.memory.compose import replay_stages
from trainer.memory.layouts.common import WIDTHS, Setting, place_batch, step_inputs
from trainer.memory.layouts.sharded import update_together
from trainer.memory.layouts.staged import Staged
from trainer.memory.profile import ModelProfile, Profile
from trainer.memory.profiles import stage_layers
from trainer.memory.timeline import Handle, Timeline
from trainer.parallel.pipeline_orders import Action, rank_orders
from trainer.parallel.pipeline_table import SCHEDULES, check_pipeline, default_stages_per_rank, stages_of_rank
from trainer.parallel.pipeline_timeline import in_flight, receive_buffers
from trainer.plan import Plan


def replay_pipeline(config: Config, plan: Plan, model: ModelProfile, timeline: Timeline, rank: int) -> Setting:
    """Replay two steps of a pipeline rank on the timeline. The setting returned knows what lies in host memory."""
    pipeline, pp, count = config.parallel.pipeline, plan.degree("pp"), plan.batch.gradient_accumulation_steps
    schedule = pipeline.schedule
    per_rank = pipeline.stages_per_rank or default_stages_per_rank(schedule)
    ranges = stage_layers(config, plan, model.outline)
    owned = stages_of_rank(schedule, pp=pp, rank=rank, stages_per_rank=per_rank)
    exchanged = SCHEDULES[schedule].arrangement != "v"
    settings: list[Setting] = []
    modules: dict[int, tuple[Profile, Staged]] = {}
    for stage in owned:
        profile = model.stage(ranges[stage], stages=len(ranges), index=stage)
        host = settings[0].host if settings else {}
        settings.append(Setting(profile=profile, plan=plan, timeline=timeline, host=host))
        modules[stage] = (profile, Staged(settings[-1], ahead=per_rank > 1, exchanged=exchanged))
    place_batch(settings[0])
    shape: dict[str, Any] = {"schedule": schedule, "pp": pp, "stages_per_rank": pipeline.stages_per_rank}
    whole = rank_orders(**shape, micro_batches=count)[rank]
    order = _shortest(**shape, micro_batches=count)[rank] if settings[0].gpu else whole
    batch = plan.batch
    hidden = batch.micro_batch_size * (batch.seq_len // plan.degree("cp")) * model.outline.hidden_size
    buffers = receive_buffers(**shape, micro_batches=count)[rank]
    neighbours = _Neighbours(
        timeline,
        owned=owned,
        last=len(ranges) - 1,
        size=hidden * WIDTHS[plan.param_dtype],
        buffers=buffers,
        keeps_sent=(1 if schedule == "1f1b" else count * len(ranges)) if not settings[0].gpu else 0,
    )
    neighbours.missing = neighbours.count_gradients(whole) - neighbours.count_gradients(order)
    inputs = step_inputs(plan, first=0 in modules, last=len(ranges) - 1 in modules)
    update = partial(update_together, [layout for _, layout in modules.values()])
    replay_stages(modules, order, timeline, inputs=inputs, neighbours=neighbours, update=update)
    return settings[0]


@cache
def _shortest(schedule: str, *, pp: int, micro_batches: int, stages_per_rank: int | None) -> list[list[Action]]:
    """The orders of a step with as few micro-batches as let every rank hold as much at once as it will: those that
    follow when the pipeline is full are no different."""
    shape: dict[str, Any] = {"schedule": schedule, "pp": pp, "stages_per_rank": stages_per_rank}
    wanted = in_flight(**shape, micro_batches=micro_batches)
    # Interleaved schedules go in rounds; a step must stay one of whole rounds.
    rounds = pp if SCHEDULES[schedule].arrangement == "loop" and micro_batches % pp == 0 else 1
    for fewer in range(pp + rounds, micro_batches, rounds):
        runs = not list(check_pipeline(**shape, micro_batches=fewer))
        if runs and in_flight(**shape, micro_batches=fewer) == wanted:
            return rank_orders(**shape, micro_batches=fewer)
    return rank_orders(**shape, micro_batches=micro_batches)


class _Neighbours:
    """Fulfils `compose.Neighbours`: hidden states and their gradients at the borders of this rank's stages.

    buffers: those that torch sets aside for good. keeps_sent: how many of the tensors that have been sent stay. torch's
    engine waits for its sends at the end of a step (1f1b: at the next one), and gloo keeps the tensors until then; NCCL
    gives them back when they have left.
    """

    def __init__(
        self, timeline: Timeline, *, owned: Sequence[int], last: int, size: int, buffers: int, keeps_sent: int
    ) -> None:
        self.timeline, self.owned, self.last, self.size, self.keeps_sent = timeline, owned, last, size, keeps_sent
        self.waiting = [timeline.allocate("buffers", size) for _ in range(buffers)]
        self.sent: list[Handle | None] = []
        self.gradients: list[Handle | None] = []
        self.missing = 0  # gradients of micro-batches that are left out of the replay

    def count_gradients(self, order: Sequence[Action]) -> int:
        """How many gradients of inputs stay until the next step."""
        return sum(action.kind == "I" and self._crosses(action.stage) for action in order)

    def _crosses(self, stage: int) -> bool:
        """Whether a stage's input comes from another rank."""
        return stage > 0 and stage - 1 not in self.owned

    def start_step(self) -> None:
        for handle in self.gradients:
            self.timeline.free(handle)
        self.gradients.clear()

    def after(self, action: Action) -> None:
        kind, stage, _ = action
        if kind == "F":
            if stage + 1 in self.owned:
                # The next stage is here: the output takes the place of the buffer it would be received in.
                self.timeline.free(self.waiting.pop())
        elif kind in "BW" and stage < self.last:
            if stage + 1 in self.owned:
                self.waiting.append(self.timeline.allocate("buffers", self.size))
            else:
                self._keep()
        if kind in "BI" and self._crosses(stage):
            if kind == "I":
                # Stays in the buffer's `.grad`, which torch clears when the next step begins.
                self.gradients.append(self.timeline.allocate("buffers", self.size))
            else:
                self._keep()

    def _keep(self) -> None:
        if len(self.sent) < self.keeps_sent:
            self.sent.append(self.timeline.allocate("buffers", self.size))

    def end_step(self) -> None:
        for handle in self.sent:
            self.timeline.free(handle)
        self.sent.clear()
        self.gradients += [self.timeline.allocate("buffers", self.size) for _ in range(self.missing)]
