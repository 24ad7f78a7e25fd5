"""All fields of all files as one set of our keys; the command line overrides them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from configs.foreign import Fate
from configs.imports import deepspeed
from configs.imports.fields import Field, show
from configs.imports.reading import Read, read_files
from configs.keys import open_key, value_at
from configs.load import group_options, load_chosen, load_config, usual
from configs.ranges import broken_range

BATCH = ("train.micro_batch_size", "train.gradient_accumulation_steps", "train.global_batch_size")


@dataclass(kw_only=True, slots=True)
class Imported:
    """Result of an import.

    options: group=option of the command line.
    settings: our keys.
    fields: the fields of all files, each with its fate.
    read: the files.
    compute: `precision.param_dtype`, from a file or the command line.
    assumed: settings that no file gives and that an estimate of memory depends on, one line each."""

    options: dict[str, str]
    settings: dict[str, Any]
    fields: list[Field]
    read: list[Read]
    compute: str
    assumed: list[str] = dataclasses.field(default_factory=list)

    def of(self, fate: Fate, *, given: bool = True) -> list[Field]:
        return [each for each in self.fields if each.fate is fate and each.given is given]


def import_files(paths: Sequence[str], overrides: Sequence[str] = (), *, config_dir: str | None = None) -> Imported:
    """Translate files. overrides: ours, which win. Raises ConfigError with every problem, one line each."""
    options, own = _from_overrides(overrides, config_dir)
    read = read_files(paths)
    problems: list[str] = []
    fields = [each for one in read for each in one.format.fields(one.source, problems)]
    fields = _layout(fields)
    if "model.path" in own:
        own.setdefault("model", None)  # a file's own choice of an option yields to it
    taken = {key: None for key in own} | {f"{group}.": None for group in options}
    settings = _merge(fields, taken, problems)
    if problems:
        raise ConfigError(*problems)
    settings |= {key: value for key, value in own.items() if key != "model"}
    _settle(fields, settings, taken, data=str(options.get("data") or settings.get("data.source")))
    _batch(fields, settings, own)
    given = load_config(overrides, config_dir=config_dir) if "precision" in options else usual()[0]
    compute = str(settings.get("precision.param_dtype", given.precision.param_dtype))
    deepspeed.leave_unread(fields, settings, compute)
    if "model.path" in own and "model.weights" not in settings and "model" not in options:
        settings.setdefault("model.weights", value_at(usual()[0], "model.weights"))
    made = Imported(options=options, settings=settings, fields=fields, read=read, compute=compute)
    made.assumed = _assumed(made)
    return made


def _from_overrides(overrides: Sequence[str], config_dir: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """The command line: options of groups, and values of keys in the schema's types."""
    if not overrides:
        return {}, {}
    config, chosen = load_chosen(overrides, config_dir=config_dir)
    groups = group_options(config_dir)
    named = [word.partition("=")[0] for word in overrides]
    if "experiment" in named:
        raise ConfigError("experiment: an import is an experiment of its own; give keys and other options")
    options = {name: chosen[name] for name in named if name in groups}
    settings: dict[str, Any] = {}
    for name in named:
        if name not in groups:
            # An open dictionary is written as a whole.
            key = open_key(name) or name
            settings[key] = value_at(config, key)
    return options, settings


def _layout(fields: list[Field]) -> list[Field]:
    """A layout that a file implies by naming none yields to a layout that any file names."""
    named = any(key.startswith("parallel.") for each in fields if each.given for key in each.settings)
    return [
        each
        for each in fields
        if each.given or not named or not any(key.startswith("parallel.") for key in each.settings)
    ]


def _strength(each: Field, key: str) -> int:
    return (2 if each.given else 0) - (key in each.implied)


def _merge(fields: list[Field], taken: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """One value for each key. Two files with different values are a problem, unless an override decides."""
    _overrule(fields)
    best: dict[str, Field] = {}
    for each in fields:
        for key, value in each.settings.items():
            other = best.get(key)
            if other is None or _strength(each, key) > _strength(other, key):
                best[key] = each
            elif (
                _strength(each, key) == 2 == _strength(other, key)
                and other.settings[key] != value
                and not _is_taken(key, taken)
            ):
                one, two = (f"{field.file}: {field.name}={show(field.value)}" for field in (other, each))
                problems.append(f"{one} and {two} say different things; give {key}=VALUE to choose")
    values = {key: each.settings[key] for key, each in best.items()}
    for key, each in best.items():
        if not _is_taken(key, taken) and (rule := broken_range(key, values[key])) is not None:
            problems.append(f"{each.file}: {each.name}={show(each.value, each.name)}: here {key}: {rule}")
    for each in fields:
        lost = [key for key, value in each.settings.items() if value != values[key]]
        for key in [*lost, *(key for key in each.settings if _is_taken(key, taken))]:
            each.settings.pop(key, None)
        if lost and not each.settings and each.given:
            each.fate, each.why = Fate.harmless, f"{best[lost[0]].name} says it"
    return {key: value for key, value in values.items() if not _is_taken(key, taken)}


def _overrule(fields: list[Field]) -> None:
    """Other fields of a file that loses are dropped with it: for example, the end of a curve belongs to the curve."""
    winning = {key: each for each in fields if each.over for key in each.settings}
    for each in fields:
        beside = [(winning[key], key, value) for key, value in each.settings.items() if key in winning]
        differing = (by for by, key, value in beside if by.file != each.file and by.settings[key] != value)
        winner = next(differing, None)
        if winner is not None and not each.over:
            each.settings.clear()
            each.fate, each.why = Fate.harmless, f"{winner.name} says it"


def _is_taken(key: str, taken: Mapping[str, Any]) -> bool:
    return key in taken or f"{key.partition('.')[0]}." in taken


def _settle(fields: list[Field], settings: dict[str, Any], taken: Mapping[str, Any], *, data: str) -> None:
    """Resolves fields that depend on the number of steps, and fields that the command line overrides. data: the
    source."""
    total = settings.get("train.steps")
    for each in fields:
        if "~warmup_ratio" in each.settings:
            ratio = each.settings.pop("~warmup_ratio")
            if not any(_is_taken(f"scheduler.warmup_{key}", taken) for key in ("steps", "ratio")):
                each.settings["scheduler.warmup_ratio"] = settings["scheduler.warmup_ratio"] = ratio
        if "~warmup_steps" in each.settings:
            number = each.settings.pop("~warmup_steps")
            if not _is_taken("scheduler.warmup_steps", taken):
                shorter = number if total is None else min(number, total)
                each.settings["scheduler.warmup_steps"] = settings["scheduler.warmup_steps"] = shorter
        if "~decay_ratio" in each.settings:
            ratio = each.settings.pop("~decay_ratio")
            if total is not None and not _is_taken("scheduler.decay_steps", taken):
                # Never into the warm-up, as in torchtitan.
                left = total - min(total, settings.get("~warmup_steps", settings.get("scheduler.warmup_steps", 0)))
                number = min(round(total * ratio), left)
                each.settings["scheduler.decay_steps"] = settings["scheduler.decay_steps"] = number
        if "~epochs" in each.settings:
            number = each.settings.pop("~epochs")
            if total is not None:
                each.fate, each.why = Fate.harmless, "train.steps counts"
            elif data in ("hub", "synthetic"):
                each.fate = Fate.lost
                each.why = f"the size of data={data} is not known: a run is as long as train.steps says (100)"
            elif _is_taken("train.epochs", taken):
                pass
            else:
                each.settings["train.epochs"] = settings["train.epochs"] = number
        if each.fate is Fate.translated and not each.settings:
            each.fate, each.why = Fate.harmless, each.why or "the command line says it"
    for key in [key for key in settings if key.startswith("~")]:
        del settings[key]


def _batch(fields: list[Field], settings: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Two numbers of the batch determine the third. If three are given, one that is a default of theirs, or that an
    override replaces, is dropped. Three that files give are kept; the plan checks them against the number of ranks."""
    if not all(settings.get(key) is not None for key in BATCH):
        return
    by = {key: each for each in fields for key in each.settings if key in BATCH}
    weak = [key for key in BATCH if key in by and not by[key].given]
    replaced = [key for key in (BATCH[1], BATCH[2], BATCH[0]) if key not in own] if own.keys() & set(BATCH) else []
    for key in [*weak, *replaced][:1]:
        del settings[key]
        if key in by:
            del by[key].settings[key]
            by[key].fate, by[key].why = Fate.harmless, "it follows from the other two numbers of the batch"


def _assumed(made: Imported) -> list[str]:
    """Settings that an estimate of memory depends on and that neither a file nor the command line gives."""
    settings, options = made.settings, made.options
    lines: list[str] = []
    if not has_model(made):
        lines.append("the model: model=tiny; give model.path=FOLDER or model=OPTION")
    if "data.seq_len" not in settings:
        lines.append(f"data.seq_len={usual()[0].data.seq_len} tokens per sequence; give data.seq_len=N")
    if not any(key in settings for key in BATCH[:1]) and BATCH[2] not in settings:
        lines.append("train.micro_batch_size=8 sequences per rank and forward; give train.micro_batch_size=N")
    if "cluster" not in options and "cluster.gpus_per_node" not in settings:
        lines.append("the ranks: those of this machine; give cluster=8xh100 or cluster.gpus_per_node=N")
    if "precision" not in options and not any(key.startswith("precision.") for key in settings):
        lines.append("float32 for everything, since no file says 16 bits; give precision=bf16 if it is")
    if any("training_arguments" in read.format.SECTIONS for read in made.read):
        lines.append(
            "float32 master weights and optimizer states: the Trainer keeps both in the dtype that the model was loaded"
            " in, which may be 16 bits"
        )
    return lines


def has_model(made: Imported) -> bool:
    return "model" in made.options or bool({"model.path", "model", "model.config"} & made.settings.keys())
