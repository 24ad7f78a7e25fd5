"""The words typed on a command line, checked one by one before Hydra sees them.

Hydra takes an unknown key with `+`, an unknown experiment without a word, and answers the rest with a page about its
search path. Here every word is looked up in the schema and in the groups' folders, and each problem is one line:
key, value, what is allowed. Values are checked while the configuration is composed (`load`), against the same types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from configs.schema import Config

# Dictionaries of the schema whose keys are not ours to list: any key may be added to them.
OPEN_KEYS = ("model.config", "logging.options")
PRESET_KEY = "model.architecture"


@cache
def schema_keys() -> dict[str, Any]:
    """Every key of the schema in its order, with its type: {"model.preset": str, ...}."""
    return dict(_walk(Config, ""))


def _walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


def is_open(key: str) -> bool:
    """Whether `key` is, or lies inside, a dictionary that takes any key."""
    return any(key == name or key.startswith(f"{name}.") for name in OPEN_KEYS)


def check_overrides(words: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each word that cannot be meant. groups: the options of each group, by its name."""
    return [problem for word in words if (problem := _check_word(word, groups)) is not None]


def _check_word(word: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    key, equals, value = word.partition("=")
    if word[:1] in ("+", "~"):
        return f"{word}: no key can be added or removed; write {key.lstrip('+~')}=value, for a key that exists"
    if not equals or not key:
        return f"{word}: write key=value"
    if key in groups:
        return _check_option(key, value, groups[key])
    if key in schema_keys() or is_open(key):
        return None
    return f"{word}: {unknown_key(key, groups)}"


def _check_option(group: str, value: str, options: Sequence[str]) -> str | None:
    if value in options or (group == "experiment" and value == "null"):
        return None
    return f"{group}={value}: no such option; choose {', '.join(options)}"


def unknown_key(key: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Why there is no such key, and which one was probably meant."""
    if key.startswith(f"{PRESET_KEY}."):
        name = key.removeprefix(f"{PRESET_KEY}.")
        return f"these are the preset's published dimensions; set model.config.{name}"
    inside = [name for name in schema_keys() if name.startswith(f"{key}.")]
    if inside:
        return f"is a section; set one of {', '.join(inside)}"
    section, _, name = key.rpartition(".")
    siblings = [other for other in schema_keys() if other.rpartition(".")[0] == section]
    guess = _closest(key, name, siblings, groups)
    hint = f"; did you mean {guess}?" if guess else ""
    if section and siblings:
        return f"no such key{hint} {section} has {', '.join(other.rpartition('.')[2] for other in siblings)}"
    return f"no such key{hint or '; the sections are ' + ', '.join(f.name for f in dataclasses.fields(Config))}"


def _closest(key: str, name: str, siblings: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str | None:
    """The key that was probably meant: a sibling spelt alike, the same name elsewhere, or anything spelt alike."""
    nearby = get_close_matches(key, siblings, n=1, cutoff=0.8)
    same_name = [other for other in schema_keys() if other.rpartition(".")[2] == name]
    anywhere = get_close_matches(key, [*schema_keys(), *groups], n=1, cutoff=0.8)
    return next(iter([*nearby, *same_name, *anywhere]), None)


def value_rule(key: str) -> str | None:
    """What a value of this key must be, in words, from its type in the schema. None if the key is unknown."""
    kind = schema_keys().get(key)
    if kind is None:
        return None
    choices = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    rule = _describe(next(choice for choice in choices if choice is not NoneType))
    return f"{rule} or null" if NoneType in choices else rule


def _describe(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"choose {', '.join(kind)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind in words:
        return f"must be {words[kind]}"
    return "must be a list: [a,b]" if get_origin(kind) is list else "must be a dictionary: {a: 1, b: 2}"
