"""Profiles on demand: traced once for each architecture, shape and set of versions, then read from disk.

An estimate needs neither torch nor transformers once its profile is on disk; importing the two costs more than all
its arithmetic. What a profile depends on is its file's name: model fields, shape, dtypes, the versions of both
libraries and the source of every module that shapes the trace.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import CookbookError
from configs.schema import Attention, Config, DType, EngineName
from trainer.devices import Gpu
from trainer.memory.profile import Anatomy, Parameter, Profile, UpdateCost, profile_from_json
from trainer.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SOURCES = ("memory/trace.py", "memory/kernels.py", "memory/tracker.py", "memory/profiles.py", "memory/profile.py")
SOURCES += ("model.py", "loss.py", "optimizer.py", "parallel/checkpointing.py")


class NotEstimated(CookbookError):
    """The command cannot answer for this configuration, and says what it would have left out."""


def get_profile(config: Config, plan: Plan, gpu: Gpu | None, *, micro_batch_size: int | None = None) -> Profile:
    """The profile of the plan's micro-batch, from disk or traced now. gpu: whose kernels are assumed; None: the CPU's.

    Raises NotEstimated for a model that cannot be traced, and what building a model raises.
    """
    micro_batch_size = micro_batch_size or plan.batch.micro_batch_size
    key = _key(config, plan, gpu, micro_batch_size)
    file = _folder(config) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(file.read_text())
        if found["key"] == key:
            return profile_from_json(found["profile"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    profile = _trace(config, plan, gpu, micro_batch_size)
    _save(file, {"key": key, "profile": profile.to_json()})
    return profile


def _folder(config: Config) -> Path:
    return Path(config.data.cache_dir).expanduser() / "memory"


def _save(file: Path, values: Mapping[str, Any]) -> None:
    """Whole or not at all. A cache that cannot be written costs time, nothing else."""
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(values))
        partial.rename(file)
    except OSError:
        partial.unlink(missing_ok=True)


def _key(config: Config, plan: Plan, gpu: Gpu | None, micro_batch_size: int) -> str:
    model = config.model
    local = Path(model.path or "").expanduser() / "config.json"
    root = Path(__file__).parents[1]
    described = {
        "model": [model.path, model.revision, str(model.attention), model.architecture, model.config],
        "local": local.read_text() if model.path and local.is_file() else None,
        "shape": [micro_batch_size, plan.batch.seq_len, *_dtypes(plan), str(config.train.activation_checkpointing)],
        "attention": [gpu is not None, _exact_attention(plan, gpu)],
        "optimizer": [str(config.optimizer.name), str(config.optimizer.implementation), config.optimizer.beta1 > 0],
        "versions": [version("torch"), version("transformers")],
        "source": hashlib.sha256(b"".join((root / name).read_bytes() for name in SOURCES)).hexdigest(),
    }
    return json.dumps(described, sort_keys=True, default=str)


def _dtypes(plan: Plan) -> tuple[DType, DType | None, DType | None]:
    """Storage of the parameters during the forward, autocast's dtype, what the logits are cast to by the root.

    FSDP2 and DeepSpeed hand the model parameters in param_dtype; one process and DDP cast at each use.
    """
    wide = DType.float64 if plan.param_dtype is DType.float64 else DType.float32
    if plan.engine is EngineName.deepspeed:
        return plan.param_dtype, None, None
    if plan.fully_sharded:
        return plan.param_dtype, None, wide
    return plan.master_dtype, None if plan.param_dtype is plan.master_dtype else plan.param_dtype, None


def _exact_attention(plan: Plan, gpu: Gpu | None) -> bool:
    """Whether torch's attention must do without CUDA's flash kernel, which takes 16 bit only and needs Ampere."""
    wide = plan.param_dtype in (DType.float32, DType.float64)
    return gpu is not None and (wide or gpu.bfloat16_flops is None)


def _trace(config: Config, plan: Plan, gpu: Gpu | None, micro_batch_size: int) -> Profile:
    from trainer.memory.trace import CannotTrace, Shape, layer_kinds, trace_model
    from trainer.model import build_hf_config, build_model
    from trainer.precision import torch_dtype

    if config.model.attention is Attention.flash_attention_2:
        # The package runs on GPUs only. torch's flash kernel keeps the same tensors.
        config = replace(config, model=replace(config.model, attention=Attention.sdpa))
    model = build_model(config.model, build_hf_config(config.model))
    anatomy, groups = _anatomy(model, tuple(layer_kinds(model)))
    storage, compute, logits = (None if dtype is None else torch_dtype(dtype) for dtype in _dtypes(plan))
    assert storage is not None
    shape = Shape(
        micro_batch_size=micro_batch_size,
        seq_len=plan.batch.seq_len,
        storage=storage,
        compute=compute,
        logits_dtype=logits,
        checkpointing=config.train.activation_checkpointing,
        gpu=gpu is not None,
        exact_attention=_exact_attention(plan, gpu),
    )
    try:
        trace = trace_model(model, shape, groups)
    except CannotTrace as error:
        raise NotEstimated(
            f"model={config.model.preset}: the code of {anatomy.name} does not run without values"
            f" ({error}), so its activations cannot be counted: not estimated. Its {anatomy.numel:,}"
            " parameters with gradients and optimizer states are a lower bound; measure a run with a small"
            " train.micro_batch_size"
        ) from None
    return Profile(anatomy=anatomy, trace=trace, update=_update_cost(config))


def _anatomy(model: PreTrainedModel, kinds: tuple[int, ...]) -> tuple[Anatomy, dict[str, tuple[str, str]]]:
    """The model's groups as FSDP2 shards them, and for each name outside the layers its group and name there."""
    from trainer.model import decoder_layers, tied_names

    layers = decoder_layers(model)
    ties = tied_names(model)
    prefixes = {id(module): name for name, module in model.named_modules()}
    inside = tuple(f"{prefixes[id(layer)]}." for layer in layers)
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    owners = (
        {}
        if ties
        else {prefixes[id(m)]: g for g, m in ends.items() if m is not None and any(True for _ in m.parameters())}
    )
    groups: dict[str, tuple[str, str]] = {}
    members: dict[str, list[Parameter]] = {"root": [], **{group: [] for group in owners.values()}}
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            group = next((group for prefix, group in owners.items() if name.startswith(f"{prefix}.")), "root")
            groups[name] = (group, name)
            members[group].append(Parameter(name, tuple(parameter.shape), parameter.requires_grad))
    examples = [layers[kinds.index(kind)] for kind in range(max(kinds) + 1)]
    anatomy = Anatomy(
        kinds=tuple(
            tuple(Parameter(name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
            for layer in examples
        ),
        layers=kinds,
        groups=tuple((name, tuple(items)) for name, items in members.items()),
        buffers_bytes=sum(b.untyped_storage().nbytes() for b in model.buffers()),
        name=type(model).__name__,
    )
    return anatomy, groups


def _update_cost(config: Config) -> UpdateCost:
    """Run the trainer's optimizer on small tensors and see what it allocates."""
    one, three = _updated(config, 1), _updated(config, 3)
    size = 4096 * 4
    temporary_all = (three[1] - one[1]) / (2 * size)
    constant = one[0] % size
    return UpdateCost(
        state=(one[0] - constant) / size,
        state_constant=constant,
        temporary_all=temporary_all,
        temporary_largest=max(0.0, one[1] / size - temporary_all),
    )


def _updated(config: Config, tensors: int) -> tuple[int, int]:
    """Bytes of state after two updates of `tensors` matrices of 4096 float32, and temporary bytes in the second."""
    import torch

    from trainer.memory.tracker import StorageTracker, balance
    from trainer.optimizer import build_optimizer

    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter.data)
    optimizer = build_optimizer([{"params": parameters}], config.optimizer)
    with StorageTracker() as tracker:
        optimizer.step()
        tracker.mark("second")
        optimizer.step()
    held = list(balance(tracker.events))
    second = next(index for index, (name, _) in enumerate(held) if name == "second")
    state = held[second][1]
    return state, max(size for _, size in held[second:]) - state
