"""Which account stands for which of DeepSpeed's optimizers."""

from __future__ import annotations

from typing import Any

from configs.choices import DType, OffloadDevice
from trainer.estimate.layouts.common import Layout, Setting
from trainer.estimate.layouts.zero import ZeroStage12
from trainer.estimate.layouts.zero1 import Bfloat16ZeroStage1
from trainer.estimate.layouts.zero3 import ZeroStage3


def zero_layout(setting: Setting, settings: dict[str, Any]) -> Layout:
    """As `deepspeed.initialize` chooses. settings: its configuration."""
    plan = setting.plan
    if plan.zero_stage == 3:
        return ZeroStage3(setting, settings)
    on_gpu = plan.offload_optimizer is OffloadDevice.none
    if plan.zero_stage == 1 and plan.param_dtype is DType.bfloat16 and on_gpu:
        return Bfloat16ZeroStage1(setting)
    return ZeroStage12(setting, settings)
