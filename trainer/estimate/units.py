"""The units of a trace: a few layers of the model, divided by the trainer's own passes, for rank 0 of a fake group.

    whole model (meta) -> keep some layers -> `trainer.passes` -> a unit

Collectives of the fake group return at once and leave their tensors as they are: shapes are right, and shapes are all
that counts here. Ranks of one group hold the same bytes, but where a vocabulary does not divide: rank 0 holds the most
of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from configs.schema import Config, Pipeline
from trainer.axes import CONTEXT, EXPERTS, PIPELINE, REPLICATE, SHARD, TENSOR, expert
from trainer.axes.fsdp import sharded_modules
from trainer.axes.gradients import local
from trainer.axes.mesh import Meshes, build_meshes
from trainer.axes.pipeline.split import Stage
from trainer.estimate.bounds import partitions
from trainer.estimate.compiled import imitate_compile
from trainer.estimate.profile import Anatomy, Parameter
from trainer.model.build import decoder_layers, held_layers
from trainer.model.layers import EightBits, gathered_width, is_packed, owned, values_shape
from trainer.model.roles import describe
from trainer.parts import Parts
from trainer.passes import divide
from trainer.plan.plan import Plan
from trainer.plan.views import View
from trainer.process.runtime import leave_world


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """kinds: those of its layers. parts: the results of the passes, and the loss."""

    kinds: tuple[int, ...]
    parts: Parts

    @property
    def module(self) -> PreTrainedModel:
        return self.parts.modules[0]

    @property
    def stage(self) -> Stage | None:
        return next(iter(self.parts.stages), None)

    @property
    def layers(self) -> list[nn.Module]:
        return held_layers(self.module)

    @property
    def returns_logits(self) -> bool:
        return self.stage is None or self.stage.is_last


@contextmanager
def _fake_mesh(plan: Plan, rank: int) -> Iterator[Meshes]:
    """The plan's meshes, whose other ranks do not exist."""
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real group; ask before it joins")
    dist.init_process_group("fake", rank=rank, world_size=plan.world_size, store=FakeStore())
    try:
        yield build_meshes(plan, torch.device("cpu"))
    finally:
        leave_world()


def layer_kinds(model: nn.Module) -> list[int]:
    """A number for each decoder layer; layers with the same number have the same modules, shapes and settings."""
    kinds: dict[str, int] = {}
    types = getattr(model.config.get_text_config(), "layer_types", None) if isinstance(model, PreTrainedModel) else None
    numbers = []
    for index, layer in enumerate(decoder_layers(model)):
        described = [types[index] if types else ""]
        for name, module in layer.named_modules():
            settings = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str) and "idx" not in key and "index" not in key
            }
            shapes = [(key, None if p is None else tuple(p.shape)) for key, p in module._parameters.items()]
            described.append(f"{name} {type(module).__name__} {sorted(settings.items())} {shapes}")
        numbers.append(kinds.setdefault("\n".join(map(str, described)), len(kinds)))
    return numbers


def shares_modules(model: nn.Module) -> bool:
    """Whether a parameter is part of several decoder layers (Zamba)."""
    held = [id(parameter) for layer in decoder_layers(model) for parameter in layer.parameters()]
    return len(held) > len(set(held))


@contextmanager
def build_unit(
    model: PreTrainedModel, layers: Sequence[int], config: Config, plan: Plan, *, first: bool = True, last: bool = True
) -> Iterator[Unit]:
    """A unit with copies of these layers of the model, which is left as it was, on the ranks that share one
    data-parallel place of the plan. first, last: whether a pipeline stage is the first, the last; both: no pipeline.

    Raises what the passes raise: ConfigError, PlanError.
    """
    kinds = layer_kinds(model)
    others = [index for index in range(len(kinds)) if index not in layers]
    # The stages before and after this one are a layer each: they are taken out again.
    before, after = others[: int(not first)], others[int(not first) :][: int(not last)]
    module = _shortened(model, [*before, *layers, *after])
    split = [count for count in (len(before), len(layers), len(after)) if count]
    pipeline = Pipeline(schedule="gpipe", split=split if len(split) > 1 else None)
    config = replace(config, parallel=replace(config.parallel, pipeline=pipeline))
    views = _shrunk(plan, len(split))
    plan = replace(plan, nodes=1, gpus_per_node=prod(views[0].degrees.values()), views=views)
    # The first rank of its stage.
    rank = plan.world_size // len(split) * int(not first)
    with _fake_mesh(plan, rank) if plan.world_size > 1 else nullcontext() as ranks:
        compiler = imitate_compile if partitions(plan) else _leave_eager
        parts = Parts(config=config, plan=plan, meshes=ranks, model=module, compiler=compiler)
        divide(parts)
        yield Unit(kinds=tuple(kinds[index] for index in layers), parts=parts)


def _leave_eager(model: nn.Module) -> None:
    """What a compiled layer keeps less is then a part of the range (`verdict.COMPILED_KEEPS`)."""


def _shrunk(plan: Plan, stages: int) -> tuple[View, ...]:
    """The plan's views with as few ranks as hold the same parts of a layer and work together on them."""
    ep, inner = plan.degree(EXPERTS), plan.degree(CONTEXT) * plan.degree(TENSOR)
    fewest = {SHARD: ep // gcd(ep, inner), PIPELINE: stages}
    dense = plan.dense.resized(lambda axis: fewest.get(axis.name, 1 if axis.reads else None))
    left = {**fewest, expert.SHARD.name: fewest[SHARD] * inner // ep, REPLICATE: 1}
    return dense, *(view.resized(lambda axis: left.get(axis.name)) for view in plan.views[1:])


def _shortened(model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """A copy of the model with only these layers."""
    stack = decoder_layers(model)
    modules, count = stack._modules, len(stack)
    try:
        stack._modules = {str(place): modules[str(index)] for place, index in enumerate(chosen)}
        short = copy.deepcopy(model)
    finally:
        stack._modules = modules
    # Lists with one entry per layer (layer_types) and the number of layers are read while the model runs.
    config = short.config.get_text_config()
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, key, [value[index] for index in chosen])
    # Embeddings with a part for each layer (Gemma 3n, 4) keep all parts: the first ones serve the layers that are here.
    if not getattr(config, "hidden_size_per_layer_input", 0):
        with suppress(NotImplementedError):  # ProphetNet counts the layers of its encoder and decoder apart
            config.num_hidden_layers = len(chosen)
    return short


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The settings of a trace in addition to the unit.

    seq_len: tokens of a sequence that one rank has. positions: the model gets them; documents: of several.
    storage, compute: dtypes of the parameters and of autocast (None: no autocast). logits_dtype: what the root casts
    its output to (FSDP2's policy), None where the loss gets the logits as they are. gpu: follow the rules by which CUDA
    chooses its attention and dropout kernels, instead of the CPU's. exact_attention: without the flash kernel, calls
    that the memory-efficient one refuses fall back to a kernel that keeps all scores. split_backward: the schedule
    computes gradients of inputs and of weights apart. backward: false: forwards alone, as in an evaluation.
    """

    micro_batch_size: int
    seq_len: int
    storage: torch.dtype
    compute: torch.dtype | None
    logits_dtype: torch.dtype | None
    gpu: bool
    exact_attention: bool = False
    positions: bool = False
    documents: bool = False
    split_backward: bool = False
    backward: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """inputs: tokens, or hidden states from the stage before. received: their gradient from the stage after. Both
    belong to the engine and are older than the trace."""

    inputs: torch.Tensor
    labels: torch.Tensor
    extras: dict[str, torch.Tensor]
    received: torch.Tensor | None


def groups_of(unit: Unit) -> dict[str, tuple[str, str]]:
    """Each parameter's name -> (the group that FSDP2 puts it in, its name there)."""
    named = {id(module): name for name, module in unit.module.named_modules()}
    found = {}
    owners = {named[id(module)]: group for group, module in sharded_modules(unit.module).items()}
    for name, _ in unit.module.named_parameters():
        prefix = next((prefix for prefix in owners if name.startswith(f"{prefix}.")), None)
        if prefix is None:
            found[name] = ("root", name)
        else:
            group = owners[prefix]
            found[name] = (group, name.removeprefix(f"{prefix}.") if group.isdigit() else name)
    return found


def describe_unit(unit: Unit, kinds: Sequence[int]) -> Anatomy:
    """The unit's parameters in groups. kinds: of all layers of the model. Only the buffers outside its layers."""
    partial = {name for tensor in unit.parts.tensor for name in tensor.partial}
    ends = set(unit.stage.tied if unit.stage else ())
    roles = describe(unit.module, unit.parts.config.parallel.tensor_plan)
    members: dict[str, list[Parameter]] = {"root": []}
    groups = groups_of(unit)
    for name, owner, last, parameter in owned(unit.module):
        group, leaf = groups[name]
        summed = TENSOR if name in partial else "ends" if name in ends else ""
        packed = owner.packed_bytes() if is_packed(owner, last) else ()
        described = Parameter(
            leaf,
            tuple(values_shape(owner, last, local(parameter))),
            trainable=parameter.requires_grad,
            summed=summed,
            packed=packed,
            eight_bits=last == "weight" and isinstance(owner, EightBits),
            gathered=gathered_width(local(parameter)),
            whole=replace(roles[name], name=leaf),
        )
        members.setdefault(group, []).append(described)
    return Anatomy(
        kinds=tuple(tuple(members[str(unit.kinds.index(kind))]) for kind in range(max(kinds) + 1))
        if set(unit.kinds) >= set(kinds)
        else (),
        layers=tuple(kinds),
        groups=tuple((group, tuple(items)) for group, items in members.items() if not group.isdigit()),
        buffers_bytes=buffers_bytes(unit.module) - sum(map(buffers_bytes, unit.layers)),
        name=type(unit.module).__name__,
    )


def buffers_bytes(module: nn.Module) -> int:
    """Bytes of its buffers: of a layer (GPT-Neo's masks), or of a whole unit."""
    return sum(buffer.untyped_storage().nbytes() for buffer in module.buffers())
