"""The order in which a plain model becomes a parallel one. The order is the lesson: read it top to bottom.

Each pass changes the model from outside and logs one line; the model's own code knows nothing of it.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from configs.schema import Checkpointing, Config
from trainer.parallel.checkpointing import apply_checkpointing
from trainer.parallel.fsdp import apply_fsdp
from trainer.plan import Plan

log = logging.getLogger(__name__)


def parallelize(model: PreTrainedModel, config: Config, plan: Plan, mesh: DeviceMesh) -> nn.Module:
    """Apply the passes that the plan asks for to a model on the meta device and return the module to call.

    Recompute comes before data parallel: what data parallel wraps must be the layer as it will run. DDP alone wraps
    after the parameters are filled (`apply_ddp`), because it copies them into its buckets.
    """
    if config.train.activation_checkpointing is not Checkpointing.none:
        apply_checkpointing(model, config.train.activation_checkpointing)
        log.info("activation checkpointing: %s", config.train.activation_checkpointing)
    if plan.fully_sharded:
        reshard = config.parallel.reshard_after_forward
        apply_fsdp(model, plan, mesh, reshard_after_forward=reshard)
        kept = "dropped after the forward" if reshard else "kept until the step"
        log.info("fully sharded: over %d ranks, gathered parameters %s", plan.degree("dp_shard"), kept)
    return model
