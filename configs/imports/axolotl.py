"""axolotl's YAML: its own names, and what it passes on to TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from configs.foreign import Fate
from configs.imports import training_arguments as trainer
from configs.imports.conversations import CHAT, EVERYONE, OWN_TEXT, label_of, renamed, speakers, together
from configs.imports.fields import Field, Handler, Source, Unreadable, translate

NAME = "axolotl"
SECTIONS = ("axolotl", "training_arguments")
# Fields of TrainingArguments that axolotl renames: their defaults do not apply.
REPLACED = {
    "optim",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "num_train_epochs",
    "save_steps",
    "logging_steps",
    "warmup_steps",
}
TEXT = ("completion", "pretrain")
ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".gz", ".zst")


def recognise(tree: Mapping[str, Any]) -> bool:
    return "base_model" in tree


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    for each in translate(source, SPECIAL, problems):
        if each.given or each.name not in REPLACED:
            yield each
    yield from trainer.layout(source)


files_named = trainer.files_named


def _warmup(source: Source, name: str, value: Any) -> Field | None:
    if source.get("warmup_steps") is not None and name == "warmup_ratio":
        return source.harmless(name, value, "warmup_steps counts")
    return trainer.warmup(source, name, value)


def _adapter(source: Source, name: str, value: Any) -> Field | None:
    if value == "lora" and source.get("load_in_4bit"):
        return source.translated(name, value, {"tuning.method": "qlora"}, "load_in_4bit=true")
    return None


def held_out(source: Source, name: str, value: Any) -> Field | None:
    """A share of the samples up to 1, their number from 1 on; 0 means no validation."""
    if value in (None, 0):
        return source.translated(name, value, {"train.eval_samples": 0}, "no validation")
    if isinstance(value, (int, float)) and value >= 1:
        return source.lost(name, value, "a number of samples is no part of them: give data.validation_fraction=PART")
    return None


def _datasets(source: Source, name: str, value: Any) -> list[Field] | Field:
    """Each data set of the list: a single one, or several local ones as a mixture."""
    if not value:
        return source.harmless(name, value, "it is not set")
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise Unreadable("must be a list of data sets, each with a path")
    sets = cast("list[Mapping[str, Any]]", value)
    if len(sets) > 1 and name != "test_datasets" and (several := _several(source, name, sets)) is not None:
        return several
    made: list[Field] = []
    for number, each in enumerate(sets):
        first = number == 0 and name != "test_datasets"
        for key, inner in each.items():
            made.append(_of_dataset(source, f"{name}[{number}].{key}", key, inner, each, first))
    return made


def _several(source: Source, name: str, sets: list[Mapping[str, Any]]) -> list[Field] | None:
    """Data sets whose samples are shuffled together, as axolotl does; None if one of them is not a local file."""
    made: list[Field] = []
    own: dict[str, dict[str, Any]] = {}
    for number, each in enumerate(sets):
        fields = [_of_dataset(source, f"{name}[{number}].{key}", key, value, each, True) for key, value in each.items()]
        settings = {key: value for field in fields for key, value in field.settings.items()}
        if "data.paths" not in settings and not (settings.get("data.source") == "chat" and "data.name" in settings):
            return None
        label = label_of(settings["data.paths"][0] if "data.paths" in settings else settings["data.name"], own)
        own[label] = settings
        for field in fields:
            if field.settings:
                field.fate, field.settings, field.why = Fate.harmless, {}, f"{name}[0] says it"
        made += fields
    first = next(field for field in made if field.name.endswith((".path", ".data_files")))
    first.fate, first.settings, first.why = Fate.translated, together(own), ""
    return made


def _of_dataset(source: Source, name: str, key: str, value: Any, each: Mapping[str, Any], first: bool) -> Field:
    if key in ("path", "data_files"):
        return _path(source, name, key, value, each, first)
    kind, custom = _kind(each), isinstance(each.get("type"), Mapping)
    if key == "type":
        if kind not in (*TEXT, *CHAT):
            return source.lost(name, value, "prompts of this form are not made here; write them as messages")
        if custom and first:
            return _named(source, name, value, each)
        return source.harmless(name, value, OWN_TEXT if kind == "alpaca" else "data.source says it")
    keys = {
        "field_messages": "data.messages_key",
        "field": "data.text_key",
        "name": "data.subset",
        "split": "data.split",
    }
    if value is not None and first:
        if key in keys:
            return source.translated(name, value, {keys[key]: value})
        if key in ("message_property_mappings", *NAMES):
            return _named(source, name, value, each)
        if key == "roles":
            made = speakers(value)
            return source.translated(name, value, made) if made else source.harmless(name, value, "as here")
        if key == "roles_to_train":
            return source.translated(name, value, {"data.train_roles": value})
        if key == "train_on_eos" and value in ("turn", True):
            return source.harmless(name, value, "what ends an answer is trained on with it")
        if key == "message_field_training" and value in FLAGS:
            return source.harmless(name, value, "that field of a message is read here")
    if key in ("ds_type", "trust_remote_code"):
        return source.harmless(name, value, "the ending of a file says what it is")
    return source.lost(name, value, "docs/data.md and docs/fine-tuning.md say what is read of a conversation")


def _kind(each: Mapping[str, Any]) -> str:
    """The form of a data set; a custom form with fields for instruction and answer counts as alpaca."""
    kind: Any = each.get("type")
    if isinstance(kind, Mapping):
        return "alpaca" if {"field_instruction", "field_output"} & kind.keys() else "custom"
    # Variants may follow a form's name: alpaca:chat, sharegpt.load_role.
    return str(kind).partition(":")[0].partition(".")[0]


def _path(source: Source, name: str, key: str, value: Any, each: Mapping[str, Any], first: bool) -> Field:
    kind = _kind(each)
    given: Any = each.get("data_files") or each.get("path")
    paths = [str(path) for path in (given if isinstance(given, list) else [given])]
    local = all(path.endswith(ENDINGS) or Path(path).exists() for path in paths)
    if not first:
        return source.lost(name, value, "one data set is read; put its files into data.paths or data.validation_paths")
    if key == "path" and each.get("data_files"):
        return source.harmless(name, value, "data_files says where it is")
    if local and kind in (*TEXT, *CHAT):
        chosen = "chat" if kind in CHAT else "files"
        return source.translated(name, value, {"data.source": chosen, "data.paths": paths})
    if kind in TEXT:
        return source.translated(name, value, {"data.source": "hub", "data.name": value})
    if kind in CHAT and value == given:
        return source.translated(name, value, {"data.source": "chat", "data.name": value})
    return source.lost(name, value, "data=chat reads it once its form is known: docs/data.md has the forms")


def _named(source: Source, name: str, value: Any, each: Mapping[str, Any]) -> Field:
    """All field names of a data set together, wherever the data set gives them."""
    mapped: Any = each.get("message_property_mappings") or {}
    custom: Any = each.get("type")
    if not isinstance(mapped, Mapping):
        raise Unreadable("must give a name for each field: {role: from, content: value}")
    given = {**(custom if isinstance(custom, Mapping) else {}), **each}
    names = {**mapped, **{ours: given.get(theirs) for theirs, ours in NAMES.items() if given.get(theirs)}}
    lost = [str(key) for key in custom if key not in NAMES] if isinstance(custom, Mapping) and value is custom else []
    if lost:
        return source.lost(name, value, f"{OWN_TEXT}: {', '.join(lost)}; the names are data.fields")
    made = renamed({ours: theirs for ours, theirs in names.items() if ours in NAMES.values()})
    return source.translated(name, value, made) if made else source.harmless(name, value, "as here")


NAMES = {
    "message_field_role": "role",
    "message_field_content": "content",
    "field_system": "system",
    "field_tools": "tools",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
}
FLAGS = ("loss", "train", "trainable", "training", "weight")
"""Fields of a message that say whether it is trained on."""


def _inputs(source: Source, name: str, value: Any) -> Field | None:
    sets: Any = source.get("datasets")
    kinds = {_kind(each) for each in sets if isinstance(each, Mapping)} if isinstance(sets, list) else set()
    if not value:
        return source.harmless(name, value, "prompts are not trained on")
    if kinds <= set(CHAT) and kinds:
        return source.translated(
            name, value, {"data.train_roles": EVERYONE}, "all that is said, not the headers of turns"
        )
    return None


def _pretraining(source: Source, name: str, value: Any) -> Field | list[Field]:
    if not value:
        return source.harmless(name, value, "it is not set")
    if isinstance(value, str):
        return source.translated(name, value, {"data.source": "hub", "data.name": value})
    sets = value if isinstance(value, list) else [value]
    renamed = [
        {"type": "pretrain", **{("field" if key == "text_column" else key): one for key, one in each.items()}}
        for each in sets
    ]
    return _datasets(source, name, renamed)


def _samples(source: Source, name: str, value: Any) -> Field:
    """Generated texts: at intervals, or as a table for each validation."""
    writes, table = bool(source.get("generate_samples")), source.get("eval_table_size") or 0
    chosen = "generate_samples" if writes else "eval_table_size"
    if not (writes or table):
        return source.harmless(name, value, "no text is written, as here")
    if not (source.get("val_set_size") or source.get("test_datasets")):
        return source.lost(name, value, "texts are written after a validation, and there is none: val_set_size")
    if name != chosen:
        unlike = ("generation_prompt_ratio", "generation_top_p", "generation_top_k")
        if writes and name in unlike and value is not None:
            return source.lost(
                name, value, "32 tokens of a text, or the question, are gone on from; any token may come"
            )
        return source.harmless(name, value, f"{chosen} says it" if name in SAMPLES else f"{chosen} is used")
    if writes:
        count, tokens = source.get("num_generation_samples", 3), source.get("generation_max_new_tokens", 50)
        heat = source.get("generation_temperature", 0.7) if source.get("generation_do_sample", True) else 0.0
        why = "after each validation"
    else:
        count, tokens, heat, why = table, source.get("eval_max_new_tokens", 128), 0.0, ""
    if not all(isinstance(each, (int, float)) for each in (count, tokens, heat)):
        raise Unreadable("must be numbers, with those that belong to it")
    made = {"from_validation": int(count), "tokens": int(tokens), "temperature": float(heat)}
    return source.translated(name, value, {f"train.samples.{key}": each for key, each in made.items()}, why)


SAMPLES = (
    *("generate_samples", "num_generation_samples", "generation_max_new_tokens", "generation_temperature"),
    *("generation_do_sample", "generation_prompt_ratio", "generation_top_p", "generation_top_k"),
    *("eval_table_size", "eval_max_new_tokens"),
)


SPECIAL: dict[str, Handler] = {
    **dict.fromkeys(SAMPLES, _samples),
    **{name: trainer.SPECIAL[name] for name in trainer.SPECIAL if name not in REPLACED},
    "early_stopping_patience": trainer.patience,
    "logging_steps": trainer.SPECIAL["logging_steps"],
    "save_steps": trainer.SPECIAL["save_steps"],
    "warmup_steps": _warmup,
    "warmup_ratio": _warmup,
    "optimizer": trainer.optimizer,
    "num_epochs": trainer.epochs,
    "adapter": _adapter,
    "val_set_size": held_out,
    "datasets": _datasets,
    "test_datasets": _datasets,
    "pretraining_dataset": _pretraining,
    "train_on_inputs": _inputs,
}
