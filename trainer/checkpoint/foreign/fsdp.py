"""Checkpoints of FSDP models: torch distributed ones (torchtitan's `step-N`, accelerate's and transformers' Trainer's
`pytorch_model_fsdp_0` and `optimizer_0`), and accelerate's whole ones (`pytorch_model_fsdp.bin`, `optimizer.bin`).

    NAME, or model.NAME                       weights
    optimizer.state.NAME.exp_avg              moments, and the optimizer's counter
    optimizer.param_groups.0.lr, ...NAME.lr   settings, by group or by parameter
    train_state.step                          torchtitan's
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import CheckpointDamaged, CheckpointMismatch
from configs.schema import Model
from trainer.checkpoint.foreign import hf_trainer, pickles, titan
from trainer.checkpoint.foreign.dcp import METADATA, Folder
from trainer.checkpoint.foreign.source import MODEL, Read, Record, Tensors, optimizer_of, settings_of
from trainer.model.build import build_hf_config, build_model
from trainer.model.fitting import WRAPPERS
from trainer.model.stored import CONFIG, some
from trainer.optim.protocol import COUNTER

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAMES = "a torch distributed checkpoint of an FSDP model (torchtitan's step-N, accelerate's pytorch_model_fsdp_0)"
MODEL_FOLDER, OPTIMIZER_FOLDER = "pytorch_model_fsdp_0", "optimizer_0"
MODEL_FILE, OPTIMIZER_FILE = "pytorch_model_fsdp.bin", "optimizer.bin"
STATE, GROUPS = "optimizer.state.", "optimizer.param_groups."
STEP = "train_state.step"
_NUMBER = re.compile(r"(?:checkpoint|step)[-_](\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Tensors by torch's keys, and the param groups."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    groups: list[dict[str, Any]]


def recognises(folder: Path) -> bool:
    places = (folder, folder / MODEL_FOLDER)
    return any((place / METADATA).is_file() for place in places) or (folder / MODEL_FILE).is_file()


def open_source(folder: Path, config: PretrainedConfig | None) -> Tensors:
    parts = _parts(folder)
    if (folder / CONFIG).is_file():
        config = build_hf_config(Model(path=str(folder)))
    theirs: dict[str, dict[str, str]] = defaultdict(dict)  # name -> kind -> key
    for key in parts.shapes:
        if key.startswith(STATE):
            name, _, kind = key.removeprefix(STATE).rpartition(".")
            theirs[name][kind] = key
    if not theirs:
        raise CheckpointMismatch(
            f"{folder}: holds no states of an optimizer, so there are no moments to go on with; begin from its weights"
        )
    for name, kinds in theirs.items():
        kinds[MODEL] = next((key for key in (name, f"{MODEL}.{name}") if key in parts.shapes), "")
        if not kinds[MODEL]:
            raise CheckpointDamaged(f"{folder}: expected the weight {name}, of which it has moments, found none")
    reads, shapes, counters = _tensors(folder, parts, theirs, config)
    settings, next_lr = settings_of(parts.groups, where=str(folder))
    updates = {int(parts.read(key)) for key in counters}
    if len(updates) > 1:
        raise CheckpointMismatch(
            f"{folder}: its parameters have had {min(updates)} to {max(updates)} updates, and here all have the same"
        )
    step, samples, more, notes = _said(folder, parts, next(iter(updates), 0))
    kinds = {key.partition("/")[0] for key in reads} - {MODEL}
    record = Record(
        kind="an FSDP model",
        step=step,
        optimizer_steps=next(iter(updates), step),
        samples=samples,
        optimizer=optimizer_of(kinds, where=str(folder)),
        settings=settings | more,
        next_lr=next_lr,
        config=config,
        tokenizer=folder,
        notes=notes,
    )
    return Tensors(record, reads, shapes)


def _parts(folder: Path) -> Parts:
    if (folder / MODEL_FILE).is_file():
        return _whole(folder)
    if (folder / METADATA).is_file():
        folders = [Folder(folder)]
    elif (folder / OPTIMIZER_FOLDER / METADATA).is_file():
        folders = [Folder(folder / MODEL_FOLDER), Folder(folder / OPTIMIZER_FOLDER)]
    else:
        raise CheckpointMismatch(
            f"{folder}: has no {OPTIMIZER_FOLDER}, so there are no moments to go on with; begin from its weights"
        )
    owner = {key: one for one in folders for key in one.tensors()}
    return Parts(
        shapes={key: shape for one in folders for key, shape in one.tensors().items()},
        read=lambda key: owner[key].tensor(key),
        groups=_groups(folders[-1]),
    )


def _groups(folder: Folder) -> list[dict[str, Any]]:
    """Settings by group; torchtitan has them by parameter."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key in folder.values():
        if key.startswith(GROUPS):
            owner, _, field = key.removeprefix(GROUPS).rpartition(".")
            if field != "params":
                found[owner][field] = folder.value(key)
    return list(found.values())


def _whole(folder: Path) -> Parts:
    """Of accelerate's FULL_STATE_DICT: two files of torch.save."""
    if not (folder / OPTIMIZER_FILE).is_file():
        raise CheckpointMismatch(
            f"{folder}: has no {OPTIMIZER_FILE}, so there are no moments to go on with; begin from its weights"
        )
    weights, states = pickles.load(folder / MODEL_FILE), pickles.load(folder / OPTIMIZER_FILE)
    try:
        tensors = {str(key): value for key, value in weights.items() if isinstance(value, torch.Tensor)}
        for name, kinds in states["state"].items():
            tensors |= {f"{STATE}{name}.{kind}": torch.as_tensor(value) for kind, value in kinds.items()}
        groups = [dict(group) for group in states["param_groups"]]
    except (TypeError, KeyError, AttributeError):
        raise CheckpointDamaged(
            f"{folder / OPTIMIZER_FILE}: expected the state of a torch optimizer, found something else"
        ) from None
    return Parts(
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()}, read=tensors.__getitem__, groups=groups
    )


def _tensors(
    folder: Path, parts: Parts, theirs: Mapping[str, Mapping[str, str]], config: PretrainedConfig | None
) -> tuple[dict[str, Read], dict[str, tuple[int, ...]], list[str]]:
    """Reads and shapes by our keys, and the keys of the counters."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in theirs}
    titans = titan.FIRST in plain.values()
    if titans and config is None:
        raise CheckpointMismatch(
            f"{folder}: holds torchtitan's own names, which are translated by the model's config; give --model FOLDER"
        )
    if titans and config is not None:
        made = titan.translate(plain.values(), config, folder)
        _check_routing(folder, parts)
    else:
        made = {name: titan.Made((name,), titan.same) for name in plain.values()}
    raw = {value: name for name, value in plain.items()}
    reads: dict[str, Read] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    counters: list[str] = []
    for ours, one in made.items():
        owners = [theirs[raw[name]] for name in one.theirs]
        for kind in owners[0]:
            keys = [owner[kind] for owner in owners if kind in owner]
            if len(keys) < len(owners):
                raise CheckpointDamaged(f"{folder}: expected {kind} of {' and '.join(one.theirs)}, found less")
            if kind == COUNTER:
                counters += keys
                continue
            reads[f"{kind}/{ours}"] = partial(_read, parts, keys, one.make)
            blank = [torch.empty(parts.shapes[key], device="meta") for key in keys]
            try:
                shapes[f"{kind}/{ours}"] = tuple(one.make(blank).shape)
            except RuntimeError:
                there = list(parts.shapes[keys[0]])
                raise CheckpointMismatch(
                    f"{folder}: has {one.theirs[0]} of the shape {there}, which the heads of this run's model do not"
                    " divide; give the same model"
                ) from None
    if config is not None:
        prefix = f"{MODEL}/"
        found = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        _check_parameters(folder, found, config)
    return reads, shapes, counters


def _read(parts: Parts, keys: Sequence[str], make: titan.Make) -> torch.Tensor:
    return make([parts.read(key) for key in keys])


def _check_routing(folder: Path, parts: Parts) -> None:
    """torchtitan's routers may add a bias of each expert, which it moves without a gradient."""
    biases = [key for key in parts.shapes if key.endswith(".moe.expert_bias")]
    if biased := [key for key in biases if parts.read(key).any()]:
        raise CheckpointMismatch(
            f"{folder}: holds {some(sorted(biased))}, by which torchtitan's routers choose experts and those of"
            " transformers do not; begin from its weights alone"
        )


def _check_parameters(folder: Path, found: Mapping[str, tuple[int, ...]], config: PretrainedConfig) -> None:
    needed = {name: tuple(parameter.shape) for name, parameter in build_model(Model(), config).named_parameters()}
    problems = []
    if lacking := sorted(needed.keys() - found.keys()):
        problems.append(f"{folder}: has no moments of {some(lacking)}, which a {config.model_type} of this run has")
    if strange := sorted(found.keys() - needed.keys()):
        problems.append(f"{folder}: has {some(strange)}, which a {config.model_type} of this run has not")
    if other := [name for name, shape in found.items() if needed.get(name, shape) != shape]:
        here, there = list(needed[other[0]]), list(found[other[0]])
        problems.append(
            f"{folder}: has {some(other)} of the shape {there}, and a {config.model_type} of this run {here}"
        )
    if problems:
        raise CheckpointMismatch(*(f"{problem}; give the same model" for problem in problems))


def _said(folder: Path, parts: Parts, updates: int) -> tuple[int, int | None, dict[str, Any], tuple[str, ...]]:
    """Step, samples, settings and notes, as the folder's writer left them."""
    if (folder / hf_trainer.TRAINER_STATE).is_file():
        state, arguments = hf_trainer.trainer_state(folder), hf_trainer.said_arguments(folder)
        samples, settings = hf_trainer.seen(folder, state, arguments)
        return int(state["global_step"]), samples, settings, hf_trainer.notes(arguments)
    if STEP in parts.shapes:
        step = int(parts.read(STEP))
    else:
        numbered = _NUMBER.fullmatch(folder.name)
        step = int(numbered[1]) if numbered else updates
    return step, None, {}, hf_trainer.notes({})
