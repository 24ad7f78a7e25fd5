"""Checkpoints of DeepSpeed: saves of ZeRO 1, 2 and 3 by any number of ranks, and universal checkpoints.

Weights are the optimizer's float32 copies. The schedule needs no state here: it is a function of the step. The
optimizer's groups hold the learning rate of the next update.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import CheckpointMismatch
from configs.schema import Model
from trainer import linear
from trainer.checkpoint.foreign import hf_trainer, universal
from trainer.checkpoint.foreign.source import MODEL, Record, Tensors, optimizer_of, settings_of
from trainer.checkpoint.foreign.universal import UniversalSave, is_universal
from trainer.checkpoint.foreign.zero import ZeroSave
from trainer.checkpoint.foreign.zero_files import complete, is_save, save_folder
from trainer.model.build import build_hf_config, build_model
from trainer.model.fitting import persistent_buffers
from trainer.model.peft import NAME
from trainer.model.stored import CONFIG, some

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAMES = "a folder of DeepSpeed (ZeRO 1, 2, 3, or universal)"
Save = ZeroSave | UniversalSave
ROOT = "base_model.model."
PEFT = re.compile(r"\.(base_layer|lora_\w+|ia3_l|prompt_encoder|modules_to_save)\.")
LORA = re.compile(rf"{re.escape(ROOT)}.+\.lora_[AB]\.{NAME}\.weight")


def recognises(folder: Path) -> bool:
    return _save_in(folder) is not None


def _save_in(folder: Path) -> Path | None:
    if is_save(folder) or is_universal(folder):
        return folder
    return save_folder(folder) or save_folder(folder, universal.LATEST)


def open_source(folder: Path, config: PretrainedConfig | None) -> Tensors:
    place = _save_in(folder) or folder
    save: Save = UniversalSave(place) if is_universal(place) else ZeroSave(place)
    # The folder of transformers' Trainer, or the one into which a script has put its saves.
    home = next((each for each in (folder, place.parent) if (each / CONFIG).is_file()), None)
    own = build_hf_config(Model(path=str(home))) if home is not None else None
    model = config or own
    adapters = _adapters(save)
    prefix = ROOT if adapters else _prefix(save, model) if model is not None else ""
    kept = {key: shape for key, shape in save.shapes().items() if not adapters or key.partition("/")[2] in adapters}
    kinds = {key.partition("/")[0] for key in kept} - {MODEL}
    where = str(place)
    settings, next_lr = settings_of(save.groups, where=where)
    _check_arithmetic(save, where)
    with complete(place):
        step, samples = int(save.model["global_steps"]), int(save.model["global_samples"])
        updates = save.updates
        record = Record(
            kind="DeepSpeed universal" if isinstance(save, UniversalSave) else f"DeepSpeed ZeRO {save.stage}",
            step=step,
            optimizer_steps=step - int(save.model.get("skipped_steps", 0)) if updates is None else updates,
            samples=samples,
            optimizer=optimizer_of(kinds, where=where),
            settings=settings | _settings(save.model, step, samples),
            next_lr=next_lr,
            config=own,
            tokenizer=home,
            notes=(*hf_trainer.notes(hf_trainer.said_arguments(home or folder)), *_notes(save, adapters)),
            adapters=linear.BARE if adapters else {},
            **_loss_scale(save.scaler),
        )
    shapes = {_ours(key, prefix): shape for key, shape in kept.items()}
    reads = {_ours(key, prefix): partial(save.read, key) for key in kept}
    return Tensors(record, reads, shapes)


def _ours(key: str, prefix: str) -> str:
    kind, _, name = key.partition("/")
    return f"{kind}/{name.removeprefix(prefix)}"


def _prefix(save: Save, config: PretrainedConfig) -> str:
    """The common prefix of the names in the save. Raises CheckpointMismatch if names or shapes are not the model's."""
    model = build_model(Model(), config)
    kind = f"{MODEL}/"
    theirs = {key.removeprefix(kind): shape for key, shape in save.shapes().items() if key.startswith(kind)}
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    first = next(iter(ours))
    prefix = next((name.removesuffix(first) for name in theirs if name.endswith(first)), "")
    theirs = {name.removeprefix(prefix): shape for name, shape in theirs.items()}
    if theirs.keys() != ours.keys():
        lacks, has = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        found = [f"lacks {some(lacks)}"] if lacks else []
        found += [f"has {some(has)}, which the model does not have"] if has else []
        raise CheckpointMismatch(
            f"{save.folder}: {' and '.join(found)}; give the model that it was trained with, in the version of"
            " transformers whose names these are"
        )
    problems = [
        f"{save.folder}: {name} has the shape {list(shape)} there and {list(ours[name])} in the model; give the"
        " same model"
        for name, shape in theirs.items()
        if shape != ours[name]
    ]
    if problems:
        raise CheckpointMismatch(*problems[:3])
    kept = {name for name, _ in persistent_buffers(model)}
    if buffers := sorted(kept & {name.removeprefix(prefix) for name in save.model.get("buffer_names", ())}):
        raise CheckpointMismatch(
            f"{save.folder}: has buffers that belong to the model ({some(buffers)}), which are not imported; begin from"
            " its weights alone"
        )
    return prefix


def _adapters(save: Save) -> set[str]:
    """Names of the trained parameters next to a frozen model that peft has wrapped; none for another model. Raises
    CheckpointMismatch for features of peft that this trainer implements differently."""
    names = {name for kind, _, name in (key.partition("/") for key in save.shapes()) if kind == MODEL}
    if not any(PEFT.search(name) for name in names):
        return set()
    states = {name for kind, _, name in (key.partition("/") for key in save.shapes()) if kind != MODEL}
    if strange := sorted(name for name in states if not LORA.fullmatch(name)):
        raise CheckpointMismatch(
            f"{save.folder}: trained {some(strange)} of a model of peft; moments are taken of the matrices of LoRA"
            " alone, with one adapter: go on from the weights, model.path=FOLDER that save_pretrained writes"
        )
    return states


def _settings(model: Mapping[str, Any], step: int, samples: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given = model.get("ds_config")
    clip = given.get("gradient_clipping") if isinstance(given, Mapping) else None
    if isinstance(clip, int | float):
        found["train.clip_grad_norm"] = float(clip)
    if step and samples % step == 0:
        found["train.global_batch_size"] = samples // step
    return found


def _notes(save: Save, adapters: Collection[str]) -> Iterator[str]:
    if adapters:
        yield "holds adapters alone: the model beneath them, tuning.alpha and tuning.dropout are those of this run"
    decay = float(save.groups[0].get("weight_decay") or 0) if len(save.groups) == 1 else 0.0
    if decay:
        yield f"its one group decays norms and biases too, by {decay:g}; here they do not decay"


def _check_arithmetic(save: Save, where: str) -> None:
    """Raises CheckpointMismatch for an update of DeepSpeed's own Adam that AdamW here does not make."""
    given: Any = save.model.get("ds_config")
    optimizer = given.get("optimizer") if isinstance(given, Mapping) else None
    parameters = (optimizer.get("params") or {}) if isinstance(optimizer, Mapping) else {}
    groups: Sequence[Mapping[str, Any]] = save.groups
    if parameters.get("adam_w_mode") is False and any(group.get("weight_decay") for group in groups):
        raise CheckpointMismatch(
            f"{where}: adam_w_mode=false adds weight decay to the gradient (Adam), and adamw here subtracts it from the"
            " weight; begin from its weights alone"
        )
    zero = given.get("zero_optimization") if isinstance(given, Mapping) else None
    dealt = isinstance(zero, Mapping) and zero.get("round_robin_gradients") is True
    if dealt and save.stage != 3 and save.ranks != 1:
        raise CheckpointMismatch(
            f"{where}: zero_optimization.round_robin_gradients=true, with which DeepSpeed records other places of the"
            " parameters than those where they lie; load it with DeepSpeed, and begin from the weights that"
            " save_16bit_model writes"
        )
    if any(group.get("bias_correction") is False for group in groups):
        raise CheckpointMismatch(
            f"{where}: bias_correction=false, which adamw here always has; begin from its weights alone"
        )


def _loss_scale(scaler: Any) -> dict[str, Any]:
    """For float16 with a dynamic scale, which DeepSpeed grows an update later than others do after an overflow."""
    window = getattr(scaler, "scale_window", None)
    if not window:
        return {}
    stable = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"loss_scale": float(scaler.cur_scale), "good_steps": (stable - 1) % window if stable > 0 else 0}
