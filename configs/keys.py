"""Every key of the schema with its type, and the rule for its values: one rule for overrides, YAML and environment.

OmegaConf converts more than a person means: it reads 2 and "on" as true, and any number as a text. So values are
checked here first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from configs.schema import Config

PRESET_KEY = "model.architecture"
MISSING = "???"  # OmegaConf's mark of a value that is not set yet


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


@cache
def _open_keys() -> tuple[str, ...]:
    """Open dictionaries of the schema: they accept any key, except for those of a preset."""
    return tuple(name for name, kind in schema_keys().items() if get_origin(kind) is dict and name != PRESET_KEY)


def open_key(key: str) -> str | None:
    """The open dictionary that `key` is, or lies inside."""
    return next((name for name in _open_keys() if key == name or key.startswith(f"{name}.")), None)


def is_open(key: str) -> bool:
    return open_key(key) is not None


def is_section(key: str) -> bool:
    return any(name.startswith(f"{key}.") for name in schema_keys())


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def set_value(config: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    setattr(value_at(config, ".".join(path)) if path else config, last, value)


def as_text(value: Any) -> str:
    """A value as it is typed in an override."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def plain_kind(key: str) -> Any:
    """The type of a key without its null."""
    kind = schema_keys()[key]
    return next(choice for choice in _choices(kind) if choice is not NoneType)


def value_rule(key: str) -> str | None:
    """The rule for this key's values, in words, from its type in the schema. None if the key is unknown."""
    if key not in schema_keys():
        return None
    rule = _describe(plain_kind(key))
    return f"{rule} or null" if NoneType in _choices(schema_keys()[key]) else rule


def broken_rule(key: str, value: Any) -> str | None:
    """The rule that a value breaks, in words; None if it is allowed. value: as read, before conversion. An
    interpolation is checked after it is resolved."""
    if isinstance(value, str) and "${" in value:
        return None
    if value == MISSING:
        return f"is OmegaConf's mark of a missing value; {value_rule(key)}"
    optional = NoneType in _choices(schema_keys()[key])
    if value is None:
        return None if optional else value_rule(key)
    kind = plain_kind(key)
    if isinstance(value, str) and kind is str:
        problem = broken_text(value) or _too_long(value)
        return f"{problem}; null leaves it out" if problem and optional and not value.strip() else problem
    if not _fits(kind, value):
        return value_rule(key)
    if isinstance(value, dict) and (names := [as_text(name) for name in value if not isinstance(name, str)]):
        dotted = f"{key.rpartition('.')[2]}.{names[0]}"
        return f"its name {names[0]} is no text; quote it in YAML, or write it with dots: {dotted}=..."
    if str not in get_args(kind)[-1:]:
        return None
    texts = value.values() if isinstance(value, dict) else value
    return next((f"each {problem}" for text in texts if (problem := broken_text(text))), None)


def broken_text(text: str) -> str | None:
    """Why a text cannot be a name, a path or a line of a script."""
    if not text.strip():
        return "must not be empty"
    if any(not character.isprintable() for character in text.replace("\t", " ")):
        return "must be one line of printable characters"
    return None


def _too_long(text: str) -> str | None:
    """File systems accept no longer paths."""
    names = text.encode().split(b"/")
    if len(names) > 1000 or max(map(len, names)) > 255 or len(text) > 4000:
        return "is too long; 255 bytes between two slashes, and 4,000 in all, are the most that a path can have"
    return None


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is UnionType else (kind,)


def _fits(kind: Any, value: Any) -> bool:
    if kind is Any or (isinstance(value, str) and "${" in value):
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(get_args(kind)[0], each) for each in value)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return isinstance(value, dict) and all(inner is Any or _fits(inner, each) for each in value.values())
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))
    if kind is int:
        return type(value) is int or (isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,40}", value) is not None)
    if kind is float:
        return type(value) in (int, float) or (isinstance(value, str) and _is_number(value))
    if issubclass(kind, StrEnum):
        return value in list(kind)
    return isinstance(value, str)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _describe(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"choose {', '.join(kind)}"
    rules = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind in rules:
        return f"must be {rules[kind]}"
    if get_origin(kind) is list:
        return "must be a list of whole numbers: [1,2]" if get_args(kind)[0] is int else "must be a list: [a,b]"
    inner = get_args(kind)[1]
    if get_origin(inner) is list:
        return "must be a dictionary of lists: {a: [b], c: [d,e]}"
    shown = {str: " of texts: {a: b, c: d}", float: " of numbers: {a: 1, b: 0.5}"}
    return f"must be a dictionary{shown.get(inner, ': {a: 1, b: 2}')}"
