"""The order in which a plain model becomes a parallel one. The order is the lesson: read it top to bottom.

Each pass changes the model from outside and logs one line; the model's own code knows nothing of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from configs.choices import Checkpointing, EngineName
from configs.schema import Config
from trainer.axes.context import apply_context_parallel
from trainer.axes.pipeline.split import Stage, split_model
from trainer.axes.shard import apply_fsdp
from trainer.axes.tensor.apply import TensorParallel, apply_tensor_parallel, tensor_plan
from trainer.axes.tensor.check import self_check
from trainer.compile import apply_compile
from trainer.document_mask import check_document_mask
from trainer.linear.four_bit import expect_codes
from trainer.plan.plan import Plan
from trainer.recompute import apply_checkpointing

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What this rank runs. modules: the model, or its pipeline stages. stages: the latter; empty without a pipeline.
    tensor: one for each module; empty without tensor parallel."""

    modules: list[PreTrainedModel]
    stages: list[Stage]
    tensor: list[TensorParallel]


def parallelize(model: PreTrainedModel, config: Config, plan: Plan, mesh: DeviceMesh) -> Parts:
    """Apply the passes that the plan asks for to a model on the meta device.

    Stages first: every later pass then works on what this rank will hold. Tensor parallel before compile and recompute,
    so that its collectives are inside both; recompute around the compiled layer, whose call it repeats. Sharding last:
    what it wraps must be the layer as it will run, and it cuts what tensor parallel has left; 4-bit layers get the
    shape of their codes before, and after the stages, for which whole layers are probed. DDP and DeepSpeed take
    the model after its parameters are filled, because they copy them into their buckets.
    """
    stages: list[Stage] = []
    tensor: list[TensorParallel] = []
    modules = [model]
    if config.data.document_mask:
        check_document_mask(model.config.get_text_config())
        log.info("document mask: attention stays inside each document")
    if plan.degree("cp") > 1:
        apply_context_parallel(model, mesh, method=config.parallel.context_method)
        log.info("context parallel: sequences over %d ranks by %s", plan.degree("cp"), config.parallel.context_method)
    if plan.degree("pp") > 1:
        stages = _split(model, config, plan, mesh)
        modules = [stage.module for stage in stages]
        layers = ", ".join(f"{stage.layers.start}-{stage.layers.stop - 1}" for stage in stages)
        log.info(
            "pipeline parallel: %d stages, this rank has layers %s; %s waits %.0f %% of a step",
            stages[0].count,
            layers,
            config.parallel.pipeline.schedule,
            100 * plan.bubble,
        )
    for module in modules:
        expect_codes(module)
    if plan.degree("tp") > 1:
        tensor = _divide(model, modules, config, mesh)
    if config.train.compile:
        for module in modules:
            apply_compile(module)
        log.info("compile: each decoder layer")
    if config.train.activation_checkpointing is not Checkpointing.none:
        for module in modules:
            apply_checkpointing(module, config.train.activation_checkpointing)
        log.info("activation checkpointing: %s", config.train.activation_checkpointing)
    if plan.fully_sharded and plan.engine is EngineName.torch:
        for module in modules:
            last = not stages or stages[modules.index(module)].is_last
            apply_fsdp(module, plan, mesh, returns_logits=last)
        kept = "dropped after the forward" if plan.reshard_after_forward else "kept for the backward"
        shards = f"over {plan.fsdp_size} ranks, gathered parameters {kept}" if plan.fsdp_size > 1 else "nothing"
        log.info("FSDP2: shards %s; gradients reduced in %s", shards, plan.reduce_dtype)
    return Parts(modules=modules, stages=stages, tensor=tensor)


def _split(model: PreTrainedModel, config: Config, plan: Plan, mesh: DeviceMesh) -> list[Stage]:
    pipeline = config.parallel.pipeline
    return split_model(
        model,
        schedule=pipeline.schedule,
        pp=plan.degree("pp"),
        rank=mesh["pp"].get_local_rank(),
        stages_per_rank=pipeline.stages_per_rank,
        split=pipeline.split,
    )


def _divide(
    model: PreTrainedModel, modules: list[PreTrainedModel], config: Config, mesh: DeviceMesh
) -> list[TensorParallel]:
    sequence = config.parallel.sequence_parallel
    table = tensor_plan(model, config.parallel.tensor_plan)
    divided = [apply_tensor_parallel(module, table, mesh["tp"], sequence_parallel=sequence) for module in modules]
    self_check(model.config, table, mesh["tp"], sequence_parallel=sequence, tuning=config.tuning)
    return divided
