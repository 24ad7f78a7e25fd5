"""A pipeline rank's step: its stages, what it does in which order, what it keeps for its neighbours.

Everything is read from the tables that the trainer runs by: which rank holds which stages (`pipeline_table`), the order
of its forwards and backwards (`pipeline_orders`), how many buffers torch sets aside for what neighbours send
(`pipeline_timeline.receive_buffers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from configs.schema import Config
from trainer.memory.compose import replay_stages
from trainer.memory.layouts.common import WIDTHS, Setting, place_batch, step_inputs
from trainer.memory.layouts.sharded import update_together
from trainer.memory.layouts.staged import Staged
from trainer.memory.profile import ModelProfile, Profile
from trainer.memory.profiles import stage_layers
from trainer.memory.timeline import Handle, Timeline
from trainer.parallel.pipeline_orders import Action, rank_orders
from trainer.parallel.pipeline_table import SCHEDULES, default_stages_per_rank, stages_of_rank
from trainer.parallel.pipeline_timeline import receive_buffers
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
    orders = rank_orders(schedule, pp=pp, micro_batches=count, stages_per_rank=pipeline.stages_per_rank)
    batch = plan.batch
    hidden = batch.micro_batch_size * (batch.seq_len // plan.degree("cp")) * model.outline.hidden_size
    buffers = receive_buffers(schedule, pp=pp, micro_batches=count, stages_per_rank=pipeline.stages_per_rank)[rank]
    neighbours = _Neighbours(
        timeline,
        owned=owned,
        last=len(ranges) - 1,
        size=hidden * WIDTHS[plan.param_dtype],
        buffers=buffers,
        keeps_sent=schedule != "1f1b" and not settings[0].gpu,
    )
    inputs = step_inputs(plan, first=0 in modules, last=len(ranges) - 1 in modules)
    update = partial(update_together, [layout for _, layout in modules.values()])
    replay_stages(modules, orders[rank], timeline, inputs=inputs, neighbours=neighbours, update=update)
    return settings[0]


class _Neighbours:
    """Fulfils `compose.Neighbours`: hidden states and their gradients at the borders of this rank's stages.

    buffers: those that torch sets aside for good. keeps_sent: torch's engine waits for what it has sent only at the end
    of a step, and gloo keeps the tensors until then; NCCL gives them back when they have left.
    """

    def __init__(
        self, timeline: Timeline, *, owned: Sequence[int], last: int, size: int, buffers: int, keeps_sent: bool
    ) -> None:
        self.timeline, self.owned, self.last, self.size, self.keeps_sent = timeline, owned, last, size, keeps_sent
        self.waiting = [timeline.allocate("buffers", size) for _ in range(buffers)]
        self.sent: list[Handle | None] = []
        self.gradients: list[Handle | None] = []

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
            elif self.keeps_sent:
                self.sent.append(self.timeline.allocate("buffers", self.size))
        if kind in "BI" and stage > 0 and stage - 1 not in self.owned:
            if kind == "I":
                # Stays in the buffer's `.grad`, which torch clears when the next step begins.
                self.gradients.append(self.timeline.allocate("buffers", self.size))
            elif self.keeps_sent:
                self.sent.append(self.timeline.allocate("buffers", self.size))

    def end_step(self) -> None:
        for handle in self.sent:
            self.timeline.free(handle)
        self.sent.clear()
