"""`checkpoint-N` of transformers' Trainer: model.safetensors, optimizer.pt, trainer_state.json.

model.safetensors    read as `model.path` is: names of older layouts and experts by transformers' own conversions
optimizer.pt         states by number: the parameters that decay in the model's order, then the others
scheduler.pt         not needed: the learning rate of the next update stands in optimizer.pt
scaler.pt            the loss scale of fp16
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open

from configs.adapter_folder import LORA, TENSORS, adapter_tuning, is_adapter_folder, read_adapter
from configs.choices import Weights
from configs.errors import CheckpointDamaged, CheckpointMismatch, ConfigError
from configs.imports.pickled import read_pickle
from configs.schema import Config, Model
from trainer import linear
from trainer.checkpoint.foreign import pickles
from trainer.checkpoint.foreign.source import MODEL, Read, Record, Tensors, alone, optimizer_of, settings_of
from trainer.model.build import build_hf_config, build_model
from trainer.model.peft import stored_name
from trainer.model.stored import CONFIG
from trainer.model.weights import open_weights
from trainer.optim.protocol import COUNTER

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAMES = "a checkpoint-N of transformers' Trainer"
TRAINER_STATE, OPTIMIZER, SCALER, ARGUMENTS = "trainer_state.json", "optimizer.pt", "scaler.pt", "training_args.bin"


def recognises(folder: Path) -> bool:
    return (folder / TRAINER_STATE).is_file() and not _elsewhere(folder)


def _elsewhere(folder: Path) -> bool:
    """Whether DeepSpeed or FSDP has written the tensors."""
    return (folder / "latest").is_file() or any(folder.glob("pytorch_model_fsdp*"))


def open_source(folder: Path, config: PretrainedConfig | None) -> Tensors:
    if not (folder / OPTIMIZER).is_file():
        raise CheckpointMismatch(
            f"{folder}: has no {OPTIMIZER} (save_only_model), so there are no moments to go on with; begin from its"
            f" weights: model.path={folder} model.weights=pretrained"
        )
    state = trainer_state(folder)
    adapters: dict[str, Any] = {}
    if is_adapter_folder(str(folder)):
        own = None
        model, adapters, (reads, shapes) = _adapter(folder, config)
    else:
        choice = Model(path=str(folder), weights=Weights.pretrained)
        own = build_hf_config(choice)
        model = build_model(choice, own)
        reads, shapes = _weights(choice, model)
    file = folder / OPTIMIZER
    optimizer = pickles.load(file)
    name_of_ours = optimizer_of(_kinds(file, optimizer), where=str(file))
    for name, found in _states(folder, model, optimizer):
        for kind, tensor in found.items():
            if kind != COUNTER:
                reads[f"{kind}/{name}"], shapes[f"{kind}/{name}"] = partial(_same, tensor), tuple(tensor.shape)
    settings, next_lr = settings_of(optimizer["param_groups"], where=str(file))
    arguments = said_arguments(folder)
    samples = seen(folder, state, arguments)
    record = Record(
        kind="transformers' Trainer",
        step=int(state["global_step"]),
        optimizer_steps=_updates(file, optimizer, int(state["global_step"])),
        samples=samples[0],
        optimizer=name_of_ours,
        settings=settings | samples[1],
        next_lr=next_lr,
        config=own,
        tokenizer=folder,
        notes=notes(arguments),
        adapters=adapters,
        **_loss_scale(folder),
    )
    return Tensors(record, reads, shapes)


def _adapter(
    folder: Path, config: PretrainedConfig | None
) -> tuple[PreTrainedModel, dict[str, Any], tuple[dict[str, Read], dict[str, tuple[int, ...]]]]:
    """The model with the adapters that the folder describes, their settings, and their tensors. Raises
    CheckpointMismatch, DataError."""
    key = f"train.resume={folder}"
    said = read_adapter(str(folder), key)
    if said.fields.get("peft_type") != LORA:
        raise CheckpointMismatch(
            f"{folder}: holds an adapter of kind {said.fields.get('peft_type')}, whose moments are not taken; go on"
            f" from its weights: model.path={folder}"
        )
    if config is None:
        raise alone(folder)
    tuning = adapter_tuning(said, key)
    model = build_model(Model(), config)
    linear.convert(model, Config(tuning=tuning))
    file = safe_open(folder / TENSORS, framework="pt")
    reads: dict[str, Read] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reads[f"{MODEL}/{name}"] = partial(file.get_tensor, stored_name(name))
            shapes[f"{MODEL}/{name}"] = tuple(parameter.shape)
    known = linear.identity(Config(tuning=tuning))
    reported = (linear.KEY, *(f"tuning.{name}" for name in ("rank", "alpha", "rslora", "dora", "init")))
    return model, {key: known[key] for key in reported}, (reads, shapes)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def trainer_state(folder: Path) -> dict[str, Any]:
    """Raises CheckpointDamaged."""
    file = folder / TRAINER_STATE
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict) and isinstance(content.get("global_step"), int):
            return content
    except (ValueError, RecursionError):
        pass
    raise CheckpointDamaged(f"{file}: expected the state of transformers' Trainer in JSON, found something else")


def said_arguments(folder: Path) -> dict[str, Any]:
    """The TrainingArguments of the checkpoint; none if the file is missing or unreadable."""
    try:
        return read_pickle(folder / ARGUMENTS) if (folder / ARGUMENTS).is_file() else {}
    except ConfigError:
        return {}


def notes(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on the parts that are not imported."""
    found = ["its order of the data and its random numbers are not taken"]
    for name, key in (("label_smoothing_factor", "label_smoothing"), ("neftune_noise_alpha", "neftune_alpha")):
        if arguments.get(name):
            found.append(f"was trained with {name}={arguments[name]}; give train.{key}={arguments[name]}")
    return tuple(found)


def _weights(choice: Model, model: PreTrainedModel) -> tuple[dict[str, Read], dict[str, tuple[int, ...]]]:
    weights = open_weights(choice, model, seed=0)(model)
    reads: dict[str, Read] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        reads[f"{MODEL}/{name}"] = partial(_weight, weights, name, parameter)
        shapes[f"{MODEL}/{name}"] = tuple(parameter.shape)
    return reads, shapes


def _weight(weights: Any, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Through `fill`, as a model gets it: a module with this parameter alone."""
    place, _, leaf = name.rpartition(".")
    unit = torch.nn.Module()
    unit.register_parameter(leaf, torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
    weights.fill(place, unit, [leaf])
    return unit.get_parameter(leaf).detach()


def _kinds(file: Path, optimizer: Any) -> set[str]:
    """The kinds of tensors that the optimizer keeps. Raises CheckpointDamaged for anything but an optimizer's state."""
    try:
        assert all(isinstance(group["params"], list) for group in optimizer["param_groups"])
        return {kind for state in optimizer["state"].values() for kind in state} - {COUNTER}
    except (TypeError, KeyError, AttributeError, AssertionError):
        raise CheckpointDamaged(f"{file}: expected the state of a torch optimizer, found something else") from None


def _states(folder: Path, model: PreTrainedModel, optimizer: Any) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """The optimizer's states, by the parameter's name. Raises CheckpointMismatch."""
    file = folder / OPTIMIZER
    groups, states = optimizer["param_groups"], optimizer["state"]
    numbers = [list(group["params"]) for group in groups]
    named = [list(group["param_names"]) for group in groups if "param_names" in group]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for order in [named] if len(named) == len(numbers) and named else _orders(model):
        pairs = [pair for names, ids in zip(order, numbers, strict=False) for pair in zip(names, ids, strict=False)]
        fits = [len(names) for names in order] == [len(ids) for ids in numbers] and all(
            tuple(tensor.shape) == shapes.get(name)
            for name, number in pairs
            for kind, tensor in states.get(number, {}).items()
            if kind != COUNTER
        )
        if fits:
            yield from ((name, states.get(number, {})) for name, number in pairs)
            return
    raise CheckpointMismatch(
        f"{file}: its param groups of {' and '.join(str(len(ids)) for ids in numbers)} parameters are not those that"
        f" transformers' Trainer makes of the model in {CONFIG}, so nobody knows whose moments they are; begin from its"
        f" weights: model.path={folder} model.weights=pretrained"
    )


def _orders(model: PreTrainedModel) -> Iterator[Sequence[list[str]]]:
    """Names by param group: those of transformers' Trainer, and those of an optimizer over all parameters."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    yield [[name for name in names if name in decayed], [name for name in names if name not in decayed]]
    yield [names]


def _updates(file: Path, optimizer: Any, step: int) -> int:
    """Updates that the optimizer has counted. torch's SGD counts none; then the trainer's count."""
    counted = {int(state[COUNTER]) for state in optimizer["state"].values() if COUNTER in state}
    if len(counted) > 1:
        raise CheckpointMismatch(
            f"{file}: its parameters have had {min(counted)} to {max(counted)} updates, and here all have had the same"
        )
    return next(iter(counted), step)


def seen(folder: Path, state: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """Samples seen so far, and settings in the arguments. Each file of random numbers stands for a rank."""
    settings: dict[str, Any] = {}
    if "max_grad_norm" in arguments:
        settings["train.clip_grad_norm"] = float(arguments["max_grad_norm"] or 0)
    each, micro_batches = state.get("train_batch_size"), arguments.get("gradient_accumulation_steps")
    ranks = len(list(folder.glob("rng_state*.pth")))
    if not (isinstance(each, int) and isinstance(micro_batches, int) and ranks):
        return None, settings
    settings["train.global_batch_size"] = each * micro_batches * ranks
    return int(state["global_step"]) * each * micro_batches * ranks, settings


def _loss_scale(folder: Path) -> dict[str, Any]:
    if not (folder / SCALER).is_file():
        return {}
    scaler = pickles.load(folder / SCALER)
    if not isinstance(scaler, dict) or "scale" not in scaler:
        return {}
    return {"loss_scale": float(scaler["scale"]), "good_steps": int(scaler.get("_growth_tracker", 0))}
