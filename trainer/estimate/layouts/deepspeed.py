"""The choice of the account for each of DeepSpeed's optimizers."""

from __future__ import annotations

from typing import Any

from configs.zero_settings import is_plain
from trainer.estimate.layouts.common import Layout, Setting
from trainer.estimate.layouts.zero import ZeroStage12
from trainer.estimate.layouts.zero1 import Bfloat16ZeroStage1
from trainer.estimate.layouts.zero3 import ZeroStage3


def zero_layout(setting: Setting, settings: dict[str, Any]) -> Layout:
    """The account of the optimizer that `deepspeed.initialize` chooses. settings: its configuration."""
    plan = setting.plan
    if plan.zero_stage == 3:
        return ZeroStage3(setting, settings)
    if is_plain(stage=plan.zero_stage, compute=plan.param_dtype, offload=plan.offload_optimizer):
        return Bfloat16ZeroStage1(setting)
    return ZeroStage12(setting, settings)
