"""The order in which a plain model becomes a parallel one. The order is the lesson: read it top to bottom.

Each pass changes the model from outside and logs one line; the model's own code knows nothing of it.
"""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from configs.schema import Checkpointing, Config
from trainer.parallel.checkpointing import apply_checkpointing
from trainer.parallel.ddp import apply_ddp
from trainer.plan import Plan
from trainer.runtime import Runtime

log = logging.getLogger(__name__)


def parallelize(model: PreTrainedModel, config: Config, plan: Plan, runtime: Runtime) -> nn.Module:
    """Apply the passes that the plan asks for and return the module to call.

    Recompute comes before data parallel: what data parallel wraps must be the layer as it will run.
    """
    if config.train.activation_checkpointing is not Checkpointing.none:
        apply_checkpointing(model, config.train.activation_checkpointing)
        log.info("activation checkpointing: %s", config.train.activation_checkpointing)
    if plan.degree("dp_replicate") > 1:
        log.info("data parallel: %d replicas, gradients reduced in %s", plan.degree("dp_replicate"), plan.reduce_dtype)
        return apply_ddp(model, plan, runtime)
    return model
