"""Config and plan in, bytes of each kind of rank out."""

from __future__ import annotations

from configs.schema import Config
from trainer.memory.compose import replay
from trainer.memory.layouts.common import Setting
from trainer.memory.layouts.replicated import Replicated
from trainer.memory.profiles import get_profile
from trainer.memory.timeline import Timeline
from trainer.plan import Plan


def estimate(config: Config, plan: Plan):
    profile = get_profile(config, plan, None)
    t = Timeline(gpu=plan.device == "cuda")
    s = Setting(profile=profile, plan=plan, timeline=t)
    from trainer.memory.layouts.sharded import FullySharded
    layout = FullySharded(s) if plan.fully_sharded else Replicated(s)
    replay(profile, layout, t, micro_batches=plan.batch.gradient_accumulation_steps)
    return t
