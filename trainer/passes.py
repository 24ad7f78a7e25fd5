"""The order in which a plain model becomes a parallel one. The order matters: read PASSES from top to bottom.

    config -> model on the meta device, unsplit -> PASSES -> the module that this rank runs

Both engines run the list, and so does the estimate, on a fake mesh and without the passes that move or create bytes.
Each pass changes the model from outside; the model's own code is unaware of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from configs.choices import Checkpointing, EngineName
from configs.errors import ConfigError
from configs.schema import Config
from trainer import linear
from trainer.axes import CONTEXT, EXPERTS, PIPELINE, TENSOR, dividing_degrees
from trainer.axes.ddp import apply_ddp
from trainer.axes.expert import on_parts
from trainer.axes.expert.apply import apply_expert_parallel, check_stacks
from trainer.axes.fsdp import apply_fsdp
from trainer.axes.pipeline.check import check_stages
from trainer.axes.pipeline.split import split_model
from trainer.axes.sequence import apply_context_parallel
from trainer.axes.sequence_check import check_sequence
from trainer.axes.tensor.apply import apply_tensor_parallel, shares, tensor_plan
from trainer.axes.tensor.check import self_check
from trainer.axes.tensor.vocabulary import chunked_cross_entropy_sum
from trainer.document_mask import check_document_mask, give_lengths
from trainer.model.build import architecture, decoder_layers, text_config
from trainer.model.causal import build_causal
from trainer.model.head import slice_head
from trainer.model.layers import mark_read_directly
from trainer.model.loss import Smoothed, cross_entropy_sum, in_training
from trainer.model.noise import Noise, add_noise
from trainer.model.probe import Probe, probe, uncalled_names, untrained_names
from trainer.model.roles import describe
from trainer.moe.balancing import build_balancing
from trainer.optim import by_role
from trainer.optim.table import saved_kinds
from trainer.parts import Parts
from trainer.plan.documents import by_length
from trainer.plan.plan import Plan
from trainer.plan.views import EXPERT
from trainer.recompute import apply_checkpointing
from trainer.update import ask

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """wanted: whether config and plan ask for the pass. apply: runs it and returns lines for the log. traced: whether
    an estimate runs it too; `trainer.estimate.layouts` counts the bytes of the others."""

    wanted: Callable[[Config, Plan], bool]
    apply: Callable[[Parts], list[str]]
    traced: bool = True


def _convert(parts: Parts) -> list[str]:
    convert_model(parts.model, parts.config)
    check_layout(parts.model, parts.config)
    linear.report(parts.model, parts.config)
    parts.described = describe(parts.model, parts.config.parallel.tensor_plan)
    trained = [parts.described[name] for name, p in parts.model.named_parameters() if p.requires_grad]
    by_role.check(trained, parts.config.optimizer, type(parts.model).__name__)
    parts.kinds = saved_kinds(trained, parts.config.optimizer)
    return []


def _mask_documents(parts: Parts) -> list[str]:
    lengths = by_length(parts.config)
    check_document_mask(parts.model.config.get_text_config(), lengths=lengths)
    if lengths:
        give_lengths(parts.model)
    how = "by its length, without a mask" if lengths else "by a mask"
    return [f"document mask: attention stays inside each document, {how}"]


def _check_sequences(parts: Parts) -> list[str]:
    check_sequence(parts.model.config.get_text_config(), cp=parts.plan.degree(CONTEXT))
    return []


def _split_sequences(parts: Parts) -> list[str]:
    method = parts.config.parallel.context_method
    apply_context_parallel(parts.model, parts.axis(), method=method)
    return [f"context parallel: sequences over {parts.plan.degree(CONTEXT)} ranks by {method}"]


def _split_layers(parts: Parts) -> list[str]:
    pipeline, plan = parts.config.parallel.pipeline, parts.plan
    parts.stages = split_model(
        parts.model,
        schedule=pipeline.schedule,
        pp=plan.degree(PIPELINE),
        rank=parts.axis(PIPELINE).get_local_rank(),
        stages_per_rank=pipeline.stages_per_rank,
        split=pipeline.split,
    )
    parts.modules = [stage.module for stage in parts.stages]
    layers = ", ".join(f"{stage.layers.start}-{stage.layers.stop - 1}" for stage in parts.stages)
    return [
        f"pipeline parallel: {parts.stages[0].count} stages, this rank has layers {layers};"
        f" {pipeline.schedule} waits {100 * plan.bubble:.0f} % of a step"
    ]


def _check_stages(parts: Parts) -> list[str]:
    check_stages(parts.model.config.get_text_config(), parts.stages[0].lengths)
    return []


def _split_experts(parts: Parts) -> list[str]:
    assert parts.meshes is not None
    alike = parts.plan.degree(TENSOR) > 1 and not on_parts(parts.config, parts.plan)
    tensor = parts.axis(TENSOR) if alike else None
    mesh = parts.meshes.of(parts.plan.view(EXPERT))[EXPERTS]
    divide = partial(apply_expert_parallel, mesh=mesh, tensor=tensor, imbalance=parts.config.estimate.imbalance)
    check_stacks(parts.model, mesh.size())
    lines = [divide(module) for module in parts.modules]
    return [line for line in lines if line]


def _split_matrices(parts: Parts) -> list[str]:
    parallel, mesh = parts.config.parallel, parts.axis(TENSOR)
    apart, sequence = parts.plan.degree(EXPERTS) > 1, parallel.sequence_parallel
    table = tensor_plan(parts.model, mesh.size(), parallel.tensor_plan, experts_apart=apart)
    divide = partial(
        apply_tensor_parallel,
        plan=table,
        tp_mesh=mesh,
        sequence_parallel=sequence,
        experts_on_parts=on_parts(parts.config, parts.plan),
    )
    parts.tensor = [divide(module) for module in parts.modules]
    return [shares(module, tensor) for module, tensor in zip(parts.modules, parts.tensor, strict=True)]


def _slice_head(parts: Parts) -> list[str]:
    parts.objective.sliced = True
    if parts.with_head is not None:
        slice_head(parts.with_head)
    return ["loss: computed in the head, in slices of tokens"]


def _choose_loss(parts: Parts) -> list[str]:
    loss: Smoothed = cross_entropy_sum
    if parts.tensor:
        loss, parts.objective.entries = parts.tensor[0].loss, parts.tensor[0].entries
        parts.objective.first = parts.tensor[0].first
    elif parts.config.train.chunked_loss or parts.stages:
        loss = chunked_cross_entropy_sum
    parts.objective.loss = in_training(loss, parts.config.train.label_smoothing)
    # Inside the model FSDP's root does not widen the logits, and a pipeline's engine keeps a number.
    if parts.with_head is not None and (parts.stages or parts.tensor or parts.objective.sliced):
        parts.objective.attach(parts.with_head, staged=bool(parts.stages))
    return []


def _disturb(parts: Parts) -> list[str]:
    train, place = parts.config.train, (0, 1)
    if parts.plan.degree(CONTEXT) > 1 and parts.meshes is not None:
        place = parts.axis(CONTEXT).get_local_rank(), parts.plan.degree(CONTEXT)
    noise = Noise(alpha=train.neftune_alpha, seq_len=parts.config.data.seq_len, seed=train.seed, slice_of=place)
    embeds = [stage.module for stage in parts.stages if stage.is_first] if parts.stages else parts.modules
    add_noise(parts.modules, embeds, noise, repeated=any(stage.repeated for stage in parts.stages))
    return [f"embeddings: uniform noise of alpha {train.neftune_alpha} in training (NEFTune)"]


def _check_matrices(parts: Parts) -> list[str]:
    parallel, mesh = parts.config.parallel, parts.axis(TENSOR)
    table, sequence = parts.tensor[0].plan, parallel.sequence_parallel
    convert = partial(linear.imitate, config=parts.config)
    self_check(parts.model.config, table, mesh, sequence_parallel=sequence, convert=convert)
    return []


def _watch_routers(parts: Parts) -> list[str]:
    group = parts.axis(CONTEXT).get_group() if parts.plan.degree(CONTEXT) > 1 else None
    tensor = parts.axis(TENSOR) if on_parts(parts.config, parts.plan) else None
    parts.balancing = build_balancing(parts.config, parts.plan, parts.model, parts.modules, group, tensor)
    return []


def _compile(parts: Parts) -> list[str]:
    for module in parts.modules:
        parts.compiler(module)
    return ["compile: each decoder layer"]


def _recompute(parts: Parts) -> list[str]:
    mode = _mode(parts.config)
    for module in parts.modules:
        apply_checkpointing(module, mode)
    return [f"activation checkpointing: {mode}"]


def _shard(parts: Parts) -> list[str]:
    found = probe(text_config(parts.model.config), parts.config.data.seq_len)
    if found is not None and found.reversible:
        raise ConfigError(
            f"parallel={parts.config.parallel.preset}: FSDP gathers a layer when it is called, and"
            f" {architecture(parts.model)} computes its layers again in a backward of their own; use parallel=ddp"
        )
    plan, inside = parts.plan, bool(parts.stages) or parts.objective.inside
    assert parts.meshes is not None
    for module in parts.modules:
        apply_fsdp(module, plan, parts.meshes, parts.described, returns_logits=not inside)
    kept = "dropped after the forward" if plan.reshard_after_forward else "kept for the backward"
    if plan.fsdp.reshard_size is not None:
        kept = f"kept for the backward by {plan.fsdp.reshard_size} together"
    shards = f"over {plan.fsdp_size} ranks, gathered parameters {kept}" if plan.fsdp_size > 1 else "nothing"
    return [f"FSDP2: shards {shards}; gradients reduced in {plan.reduce_dtype}"]


def _fill(parts: Parts) -> list[str]:
    assert parts.fill is not None
    for module in parts.modules:
        parts.fill(module)
        module.train()
    # It holds the source of the values: perhaps the whole model, as every process has read it.
    parts.fill = None
    return []


def _replicate(parts: Parts) -> list[str]:
    parts.ddp = apply_ddp(parts.model, parts.plan, next(parts.model.parameters()).device, parts.objective)
    return []


def _partition(parts: Parts) -> list[str]:
    assert parts.zero is not None
    parts.zero(parts)
    return []


def _always(config: Config, plan: Plan) -> bool:
    return True


def _mode(config: Config) -> Checkpointing:
    return config.train.activation_checkpointing


PASSES = (
    # Kinds of linear layers, and the choice of trained parameters: on the whole model, before anything is divided.
    Pass(wanted=_always, apply=_convert),
    Pass(wanted=lambda config, plan: config.data.document_mask, apply=_mask_documents, traced=False),
    Pass(wanted=lambda config, plan: plan.degree(CONTEXT) > 1, apply=_check_sequences, traced=False),
    Pass(wanted=lambda config, plan: plan.degree(CONTEXT) > 1, apply=_split_sequences),
    # Stages come before the rest, so that later passes work on the layers that this rank will hold.
    Pass(wanted=lambda config, plan: plan.degree(PIPELINE) > 1, apply=_split_layers),
    Pass(wanted=lambda config, plan: plan.degree(PIPELINE) > 1, apply=_check_stages, traced=False),
    # Before tensor parallel, which then leaves the experts unchanged.
    Pass(wanted=lambda config, plan: plan.degree(EXPERTS) > 1, apply=_split_experts),
    # Before tensor parallel, whose collectives then surround all slices.
    Pass(wanted=lambda config, plan: config.train.chunked_loss, apply=_slice_head),
    # Before compile and recompute, so that its collectives are inside both.
    Pass(wanted=lambda config, plan: plan.degree(TENSOR) > 1, apply=_split_matrices),
    Pass(wanted=lambda config, plan: plan.degree(TENSOR) > 1, apply=_check_matrices, traced=False),
    Pass(wanted=_always, apply=_choose_loss),
    # After the checks, which compare the divided model with the whole one.
    Pass(wanted=lambda config, plan: config.train.neftune_alpha > 0, apply=_disturb),
    # Inside recompute, which must find the routers' terms again.
    Pass(wanted=_always, apply=_watch_routers),
    # It chooses single operations, which the compiler has to see.
    Pass(wanted=lambda config, plan: _mode(config) is Checkpointing.selective, apply=_recompute),
    Pass(wanted=lambda config, plan: config.train.compile, apply=_compile),
    # Around the compiled layer, whose call it repeats.
    Pass(wanted=lambda config, plan: _mode(config) is Checkpointing.full, apply=_recompute),
    # FSDP wraps the final layer and shards the weights that tensor parallel leaves.
    Pass(
        wanted=lambda config, plan: plan.fully_sharded and plan.engine is EngineName.torch, apply=_shard, traced=False
    ),
    Pass(wanted=_always, apply=_fill, traced=False),
    # These two copy parameters into their own buckets, so they come after the values.
    Pass(wanted=lambda config, plan: plan.copied and ask(config.optimizer).GRADIENTS, apply=_replicate, traced=False),
    Pass(wanted=lambda config, plan: plan.engine is EngineName.deepspeed, apply=_partition, traced=False),
)


def parallelize(parts: Parts) -> None:
    """Run the plan's passes over a model on the meta device. A collective. Raises what the passes raise."""
    for step in PASSES:
        if step.wanted(parts.config, parts.plan):
            for line in step.apply(parts):
                log.info("%s", line)


def divide(parts: Parts) -> None:
    """The passes that an estimate traces, over a few layers of a model from `prepare_model`."""
    for step in PASSES[1:]:
        if step.traced and step.wanted(parts.config, parts.plan):
            step.apply(parts)


def prepare_model(config: Config) -> PreTrainedModel:
    """The model after the first pass: not yet split, with its trained parameters marked. Raises as the two steps do."""
    model = build_causal(config)
    convert_model(model, config)
    return model


def convert_model(model: PreTrainedModel, config: Config) -> None:
    """Convert the linear layers as the config asks, and freeze parameters without gradient. Raises as
    `linear.convert`."""
    found = probe(text_config(model.config), config.data.seq_len)
    if found is not None:
        mark_read_directly(model, uncalled_names(model, found))
    linear.convert(model, config, untrained_names(model, found) if found is not None else ())


def _idle_layers(model: PreTrainedModel, found: Probe | None) -> list[str]:
    """Names of the decoder layers in which no parameter gets a gradient."""
    untrained = {*untrained_names(model, found)} if found is not None else set()
    layers = {id(layer) for layer in decoder_layers(model)}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in layers and untrained.issuperset(f"{name}.{leaf}" for leaf, _ in module.named_parameters())
    ]


def check_layout(model: PreTrainedModel, config: Config) -> None:
    """Raise ConfigError if the layout cannot train this model. The estimate keeps one model for several layouts."""
    name = type(model).__name__
    problems = []
    if model.config.get_text_config() is not model.config:
        # The passes that split a model know only the names of language models.
        problems += [
            f"parallel.{axis}={degree}: cuts language models; a {name} has parts for images or sound"
            " as well; use model.text_only=true, or parallel=single, ddp or fsdp"
            for axis, degree in dividing_degrees(config).items()
        ]
    found = probe(text_config(model.config), config.data.seq_len)
    if found is not None and found.reversible and not model.get_input_embeddings().weight.requires_grad:
        problems.append(
            f"{linear.setting(config)}: {name} computes its layers again in a backward of their own, which"
            " needs the embeddings' gradient, and they are frozen; use tuning=full"
        )
    if config.parallel.sequence_parallel and (idle := _idle_layers(model, found)):
        # The last layer gathers the sequence again; if the model skips it, the sequence would stay divided.
        problems.append(
            f"parallel.sequence_parallel=true: {name} leaves layers out where there is text alone ({', '.join(idle)});"
            " use parallel.sequence_parallel=false"
        )
    if problems:
        raise ConfigError(*problems)
