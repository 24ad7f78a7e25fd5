"""Two engines behind one protocol: `torch` (DDP) and `deepspeed` (ZeRO 1-3 with offload).

The loop depends only on `Engine`. `build_engine` builds one from config and plan and imports only the one that it
needs: DeepSpeed takes seconds to import and is not wanted in a DDP run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.choices import EngineName
from configs.schema import Config
from trainer import update
from trainer.engine.protocol import Counters, Engine, StepReport, StepResult
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from trainer.process.runtime import Runtime

__all__ = ["Counters", "Engine", "StepReport", "StepResult", "build_engine"]


def build_engine(config: Config, plan: Plan, runtime: Runtime) -> Engine:
    """The engine that the plan names, with the model built, filled and ready for step 1. A collective."""
    if plan.engine is EngineName.deepspeed:
        from trainer.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, plan, runtime)
    from trainer.engine.in_backward import InBackward
    from trainer.engine.mezo import Mezo
    from trainer.engine.torch import TorchEngine

    made: dict[update.Update, type[TorchEngine]] = {update.in_backward: InBackward, update.mezo: Mezo}
    return made.get(update.ask(config.optimizer), TorchEngine)(config, plan, runtime)
