"""What is traced: a few layers of the model, cut and divided by the trainer's own passes, for rank 0 of a fake group.

    whole model (meta) -> keep some layers -> context parallel -> pipeline stage -> tensor parallel -> a unit

The order is that of `trainer.passes`. Collectives of the fake group return at once and leave their tensors as
they are: shapes are right, and shapes are all that counts here. Ranks of one group hold the same bytes, but where a
vocabulary does not divide: rank 0 holds the most of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from configs.choices import ContextMethod
from trainer.axes.context import apply_context_parallel
from trainer.axes.gradients import local
from trainer.axes.pipeline.split import Stage, split_model
from trainer.axes.shard import sharded_modules
from trainer.axes.tensor.apply import TensorParallel, divide, tensor_plan
from trainer.estimate.profile import Anatomy, Parameter
from trainer.linear.four_bit import is_quantized, stored_bytes
from trainer.model.build import decoder_layers, held_layers
from trainer.model.roles import describe as describe_roles


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """How ranks of one data-parallel place share the model: see `configs.schema.Parallel`."""

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    tensor_plan: Mapping[str, str] = field(default_factory=dict)
    context_method: ContextMethod = ContextMethod.ulysses


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """kinds: of its layers. stage: what the pipeline knows of it; tensor: what tensor parallel does."""

    module: PreTrainedModel
    kinds: tuple[int, ...]
    stage: Stage | None = None
    tensor: TensorParallel | None = None

    @property
    def layers(self) -> list[nn.Module]:
        return held_layers(self.module)

    @property
    def returns_logits(self) -> bool:
        return self.stage is None or self.stage.is_last


@contextmanager
def fake_ranks(division: Division) -> Iterator[DeviceMesh | None]:
    """A mesh of axes cp and tp whose other ranks do not exist. None where nothing is divided."""
    if division.tp * division.cp == 1:
        yield None
        return
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a real group; ask before it joins")
    dist.init_process_group("fake", rank=0, world_size=division.cp * division.tp, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (division.cp, division.tp), mesh_dim_names=("cp", "tp"))
    finally:
        dist.destroy_process_group()


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


def build_unit(
    model: PreTrainedModel,
    layers: Sequence[int],
    division: Division,
    mesh: DeviceMesh | None,
    *,
    first: bool = True,
    last: bool = True,
) -> Unit:
    """A unit with copies of these layers of the model, which is left as it was. first, last: whether a pipeline stage
    is the first, the last; both: no pipeline.

    Raises what the passes raise: ConfigError, PlanError.
    """
    kinds = layer_kinds(model)
    others = [index for index in range(len(kinds)) if index not in layers]
    # The stages before and after this one are a layer each: they are taken out again.
    before, after = others[: int(not first)], others[int(not first) :][: int(not last)]
    module = _shortened(model, [*before, *layers, *after])
    if division.cp > 1:
        assert mesh is not None
        apply_context_parallel(module, mesh, method=division.context_method)
    plan = tensor_plan(module, division.tensor_plan) if division.tp > 1 else {}
    stage = None
    if not (first and last):
        split = [count for count in (len(before), len(layers), len(after)) if count]
        (stage,) = split_model(module, schedule="gpipe", pp=len(split), rank=int(not first), split=split)
        module = stage.module
    tensor = None
    if division.tp > 1:
        assert mesh is not None
        tensor = divide(module, plan, mesh["tp"], sequence_parallel=division.sequence_parallel)
    return Unit(module=module, kinds=tuple(kinds[index] for index in layers), stage=stage, tensor=tensor)


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
    config.num_hidden_layers = len(chosen)
    return short


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


def describe(unit: Unit, kinds: Sequence[int]) -> Anatomy:
    """The unit's parameters in groups. kinds: of all layers of the model. Only the buffers outside its layers."""
    partial = set(unit.tensor.partial if unit.tensor else ())
    ends = set(unit.stage.tied if unit.stage else ())
    roles = describe_roles(unit.module)
    members: dict[str, list[Parameter]] = {"root": []}
    for name, (group, leaf) in groups_of(unit).items():
        parameter = unit.module.get_parameter(name)
        summed = "tp" if name in partial else "ends" if name in ends else ""
        owner, _, last = name.rpartition(".")
        module = unit.module.get_submodule(owner)
        packed = stored_bytes(module) if is_quantized(module, last) else ()
        shape = tuple(local(parameter).shape)
        described = Parameter(leaf, shape, parameter.requires_grad, summed, packed, replace(roles[name], name=leaf))
        members.setdefault(group, []).append(described)
    return Anatomy(
        kinds=tuple(tuple(members[str(unit.kinds.index(kind))]) for kind in range(max(kinds) + 1))
        if set(unit.kinds) >= set(kinds)
        else (),
        layers=tuple(kinds),
        groups=tuple((group, tuple(items)) for group, items in members.items() if not group.isdigit()),
        buffers_bytes=_buffers(unit.module) - sum(map(_buffers, unit.layers)),
        name=type(unit.module).__name__,
    )


def layer_buffers(unit: Unit) -> int:
    """Bytes of buffers in one layer (GPT-Neo's masks), on average."""
    return sum(map(_buffers, unit.layers)) // len(unit.layers)


def _buffers(module: nn.Module) -> int:
    return sum(buffer.untyped_storage().nbytes() for buffer in module.buffers())
