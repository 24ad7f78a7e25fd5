"""LLaMA-Factory's YAML: its own names, and what it passes on to TrainingArguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.foreign import Fate
from configs.imports import training_arguments as trainer
from configs.imports.axolotl import held_out
from configs.imports.conversations import EVERYONE, SHAREGPT, label_of, renamed, speakers, together
from configs.imports.fields import Field, Handler, Source, Unreadable, translate

NAME = "LLaMA-Factory"
SECTIONS = ("llama_factory", "training_arguments")
INFO = "dataset_info.json"
SPEAKERS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
READ = {
    *("file_name", "formatting", "columns", "tags", "ranking", "hf_hub_url", "ms_hub_url", "om_hub_url"),
    *("subset", "split"),
    *(f"tags.{each}" for each in (*SPEAKERS, "role_tag", "content_tag")),
}
"""Fields of a data set's entry in that list that are read; of several places of the same data, the file is used."""
MARKS = {"finetuning_type", "cutoff_len", "stage", "lora_target", "dataset_dir", "template"}


def recognise(tree: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in tree and bool(MARKS & tree.keys())


def fields(source: Source, problems: list[str]) -> Iterator[Field]:
    lora = source.get("finetuning_type", "lora") == "lora"
    for each in translate(source, SPECIAL, problems):
        if each.given or lora or not each.name.startswith("lora_"):
            yield each
    rank = source.get("lora_rank", 8)
    if lora and source.get("lora_alpha") is None and isinstance(rank, int) and rank > 0:
        default = source.translated("lora_alpha", "", {"tuning.alpha": 2.0 * rank}, "twice lora_rank")
        default.given = False
        yield default
    yield from trainer.layout(source)


files_named = trainer.files_named


def _stage(source: Source, name: str, value: Any) -> Field:
    if value in ("sft", "pt"):
        kind = "chat" if value == "sft" else "files"
        return source.harmless(name, value, f"data={kind} is the same, once data.paths are given")
    return source.lost(name, value, "only causal language modelling is trained, no preferences or rewards")


def _tuning(source: Source, name: str, value: Any) -> Field | None:
    if value == "lora" and source.get("quantization_bit") == 4:
        return source.translated(name, value, {"tuning.method": "qlora"}, "quantization_bit=4")
    return None


def _target(source: Source, name: str, value: Any) -> Field | None:
    return source.harmless(name, value, "all linear layers of the decoder layers, as here") if value == "all" else None


def _dataset(source: Source, name: str, value: Any) -> list[Field]:
    made = _files(source, name, value)
    return [made, *_unread(source, value)] if made.fate is Fate.translated else [made]


def _unread(source: Source, value: Any) -> Iterator[Field]:
    """Settings of a data set in the list that have no counterpart, as one field each."""
    for label, (_, each) in zip(_names(value), _described(source, value) or [], strict=False):
        tags: Any = each.get("tags") or {}
        given = {**each, **{f"tags.{key}": tags[key] for key in tags}}
        for key in sorted(given.keys() - READ):
            yield source.lost(f"{label}.{key}", given[key], f"{INFO} says it, and nothing here does the same")


def _files(source: Source, name: str, value: Any) -> Field:
    kind = "chat" if source.get("stage", "sft") == "sft" else "files"
    key = "data.validation_paths" if name == "eval_dataset" else "data.paths"
    if not value:
        return source.harmless(name, value, "it is not set")
    found = _described(source, value)
    if found is None:
        return source.lost(name, value, f"no {INFO} in dataset_dir describes it; give data={kind} {key}=[FILE.jsonl]")
    files = [str(folder / str(each["file_name"])) for folder, each in found if each.get("file_name")]
    places = [_place(kind, folder, each) for folder, each in found]
    if name == "dataset" and all(places) and not any(each.get("ranking") for _, each in found):
        return source.translated(
            name, value, _mixed(source, kind, places, [each for _, each in found]), f"as {INFO} says"
        )
    shapes = [{part: each.get(part) for part in ("formatting", "columns", "tags", "ranking")} for _, each in found]
    if len(files) < len(found) or any(shape != shapes[0] for shape in shapes) or shapes[0]["ranking"]:
        why = "one form of files is read, no preferences and no data sets of a hub; download and convert them"
        return source.lost(name, value, f"{why}, and give data={kind} {key}=[FILE.jsonl]")
    made = _shape(shapes[0]) if kind == "chat" else {}
    return source.translated(name, value, {"data.source": kind, key: files, **made}, f"as {INFO} says")


def _place(kind: str, folder: Path, each: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for the place of a data set: a file, or conversations on the hub; empty if it cannot be read here."""
    if each.get("file_name"):
        return {"data.paths": [str(folder / str(each["file_name"]))]}
    if kind == "chat" and each.get("hf_hub_url"):
        more = {f"data.{key}": each[key] for key in ("subset", "split") if each.get(key)}
        return {"data.name": str(each["hf_hub_url"]), **more}
    return {}


def _mixed(source: Source, kind: str, places: list[dict[str, Any]], found: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One data set or several: shuffled together, or interleaved by their probabilities."""
    sources: dict[str, dict[str, Any]] = {}
    for place, each in zip(places, found, strict=True):
        file: str = place["data.paths"][0] if "data.paths" in place else place["data.name"]
        shape = _shape({part: each.get(part) for part in ("formatting", "columns", "tags")}) if kind == "chat" else {}
        sources[label_of(file, sources)] = {"data.source": kind, **place, **shape}
    if len(sources) == 1:
        return next(iter(sources.values()))
    return together(sources, _probabilities(source))


def _probabilities(source: Source) -> list[float]:
    """Weights of an interleaving; none if data sets are concatenated."""
    if source.get("mix_strategy", "concat") == "concat" or len(_names(source.get("dataset"))) < 2:
        return []
    given: Any = source.get("interleave_probs")
    values = given if isinstance(given, list) else str(given).split(",") if given else []
    count = len(_names(source.get("dataset")))
    if values and len(values) != count:
        raise Unreadable(f"interleave_probs={given} must have a number for each of {count} data set(s)")
    return [float(each) for each in values] or [1.0] * count


def _names(value: Any) -> list[str]:
    return value if isinstance(value, list) else [each.strip() for each in str(value).split(",")]


def _strategy(source: Source, name: str, value: Any) -> Field:
    """What happens when a source is exhausted: the first one ends the run, or none does."""
    if value in (None, "concat"):
        return source.harmless(name, value, "samples are shuffled together, as here")
    if value not in ("interleave_under", "interleave_over"):
        raise Unreadable("choose concat, interleave_under, interleave_over")
    exhausted = "stop" if value == "interleave_under" else "repeat"
    return source.translated(name, value, {"data.exhausted": exhausted}, "weights of data.mixture are interleave_probs")


def _probs(source: Source, name: str, value: Any) -> Field:
    unused = not value or not _probabilities(source)
    return source.harmless(name, value, "it is not used" if unused else "weights of data.mixture say it")


def _described(source: Source, value: Any) -> list[tuple[Path, Mapping[str, Any]]] | None:
    """Each data set's entry in the list, with its folder; None if there is no list, or an entry is missing."""
    folder = Path(str(source.get("dataset_dir") or "data"))
    names = _names(value)
    for place in (folder, source.path.parent / folder):
        try:
            listed: Any = json.loads((place / INFO).read_text())
        except (OSError, ValueError):
            continue
        if isinstance(listed, dict) and all(isinstance(listed.get(each), dict) for each in names):
            return [(place, listed[each]) for each in names]
    return None


def _shape(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for the names of columns, message fields and speakers."""
    columns: dict[str, Any] = dict(shape["columns"] or {})
    tags: dict[str, Any] = dict(shape["tags"] or {})
    ours = {"prompt": "instruction", "query": "input", "response": "output"}
    names = {ours.get(key, key): theirs for key, theirs in columns.items()}
    messages = names.pop("messages", None)
    alpaca = (shape["formatting"] or "alpaca") == "alpaca"
    if not alpaca:
        names |= {name: tags.get(f"{name}_tag", usual) for name, usual in SHAREGPT.items()}
    said = {ours: tags[theirs] for theirs, ours in SPEAKERS.items() if theirs in tags}
    found = {**renamed(names), **speakers(said)}
    return {**found, **({"data.messages_key": messages} if messages and not alpaca else {})}


def _prompts(source: Source, name: str, value: Any) -> Field:
    if not value:
        return source.harmless(name, value, "prompts are not trained on")
    return source.translated(name, value, {"data.train_roles": EVERYONE}, "all that is said, not the headers of turns")


SPECIAL: dict[str, Handler] = {
    **trainer.SPECIAL,
    "early_stopping_steps": trainer.patience,
    "stage": _stage,
    "finetuning_type": _tuning,
    "lora_target": _target,
    "dataset": _dataset,
    "eval_dataset": _dataset,
    "val_size": held_out,
    "mix_strategy": _strategy,
    "interleave_probs": _probs,
    "train_on_prompt": _prompts,
}
