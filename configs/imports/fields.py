"""A field of another trainer's file, its fate, and how the table translates it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from configs.foreign import ABSENT, Entry, Fate, entry, look_up, table
from configs.keys import broken_rule, plain_kind, schema_keys


@dataclass(kw_only=True, slots=True)
class Field:
    """One field of a file.

    settings: our keys with their values; a key that begins with `~` depends on other fields (`combine`).
    implied: settings that another field may override.
    why: remark.
    given: whether the file contains it; otherwise it is a default of theirs.
    over: whether its trainer prefers it to another file's value for the same setting.
    """

    file: str
    name: str
    value: Any
    fate: Fate
    settings: dict[str, Any] = field(default_factory=dict)
    implied: frozenset[str] = frozenset()
    why: str = ""
    given: bool = True
    over: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A file that was read. name: as typed by a person. tree: its values. sections: sections of the table; the first
    that knows a name translates it. together: formats of all files that are read together."""

    name: str
    path: Path
    tree: Mapping[str, Any]
    sections: tuple[str, ...]
    together: frozenset[str] = frozenset()

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its name, dots between sections."""
        found: Any = self.tree
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def translated(
        self, name: str, value: Any, settings: Mapping[str, Any], why: str = "", *, implied: bool = False
    ) -> Field:
        weak = frozenset(settings if implied else ())
        return Field(
            file=self.name,
            name=name,
            value=value,
            fate=Fate.translated,
            settings=_typed(settings),
            why=why,
            implied=weak,
        )

    def harmless(self, name: str, value: Any, why: str) -> Field:
        return Field(file=self.name, name=name, value=value, fate=Fate.harmless, why=why)

    def lost(self, name: str, value: Any, why: str) -> Field:
        return Field(file=self.name, name=name, value=value, fate=Fate.lost, why=why)


Handler = Callable[[Source, str, Any], "Field | list[Field] | None"]
"""Translates a field that needs more than one value of the file. None: use the table."""


class Unreadable(ValueError):
    """An impossible value; the text is the rule that it breaks."""


def translate(source: Source, special: Mapping[str, Handler], problems: list[str]) -> Iterator[Field]:
    """Each field of a source, and their defaults that differ from ours. problems: receives a line per bad value."""
    seen: set[str] = set()
    for name, value in flatten(source.tree, special):
        seen.add(name)
        yield from _one(source, special, name, value, problems)
    for name, line in defaults(source.sections).items():
        if name in seen or any(each.startswith(f"{name}.") for each in seen):
            continue
        for each in _one(source, special, name, line.default, problems):
            each.given = False
            yield each


def _one(source: Source, special: Mapping[str, Handler], name: str, value: Any, problems: list[str]) -> list[Field]:
    try:
        found = special[name](source, name, value) if name in special else None
        found = by_table(source, name, value) if found is None else found
    except Unreadable as error:
        problems.append(f"{source.name}: {name}={show(value, name)}: {error}")
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError):
        # A kind of value that its trainer does not accept either, or a conflict with another field.
        problems.append(f"{source.name}: {name}={show(value, name)}: no value, or not together with the other fields")
    else:
        return found if isinstance(found, list) else [found]
    return []


def defaults(sections: tuple[str, ...]) -> dict[str, Entry]:
    """Fields with a default of theirs; the first section that knows a name supplies it."""
    found: dict[str, Entry] = {}
    for section in sections:
        for name, line in table()[section].items():
            found.setdefault(name, line)
    return {name: line for name, line in found.items() if line.default is not ABSENT and line.default is not None}


def flatten(tree: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their names, dots between sections. whole: sections that are one value."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in whole:
            yield from flatten(cast("Mapping[str, Any]", value), whole, f"{name}.")
        else:
            yield name, value


def by_table(source: Source, name: str, value: Any) -> Field:
    """The table's translation of a field."""
    line = next((found for section in source.sections if (found := look_up(section, name)) is not None), None)
    if line is None and not value and any(_has_section(section, name) for section in source.sections):
        return source.harmless(name, value, "it is not set")
    if line is None:
        return Field(file=source.name, name=name, value=value, fate=Fate.unknown, why="no version of it is known here")
    return by_entry(source, line, name, value)


def _has_section(section: str, name: str) -> bool:
    return any(each.startswith(f"{name}.") for each in table()[section])


def by_entry(source: Source, line: Entry, name: str, value: Any) -> Field:
    if line.values is not None:
        text = str(value).lower()
        here = line.values.get("none" if text == "null" else text, line.values.get("*", ABSENT))
        if here is ABSENT and value in (None, ""):
            return source.harmless(name, value, "it is not set")
        if here is ABSENT:
            raise Unreadable(f"choose {', '.join(each for each in line.values if each != '*')}")
        if isinstance(here, str):
            other = entry(here)
            return Field(file=source.name, name=name, value=value, fate=other.fate, why=other.note)
        settings = {key: _fill(ours, value) for key, ours in here.items()}
        why = line.note if line.fate is Fate.translated else ""
        made = source.translated(name, value, _typed(settings), why if settings else "")
        made.implied = frozenset(settings.keys() - {line.key})
        return made if settings else source.harmless(name, value, "as here")
    if line.fate is Fate.lost and line.is_off(value):
        return source.harmless(name, value, "as here")
    if line.fate is not Fate.translated:
        return Field(file=source.name, name=name, value=value, fate=line.fate, why=line.note)
    if value is None:
        return source.harmless(name, value, "it is not set")
    if line.key is None:
        return source.lost(name, value, f"no single key takes it; see {', '.join(line.keys)}")
    number = _number(value) * line.times if line.times is not None else value
    return source.translated(name, value, _typed({line.key: number}), line.note)


def _fill(ours: Any, value: Any) -> Any:
    if isinstance(ours, dict):
        return {key: _fill(each, value) for key, each in ours.items()}
    if isinstance(ours, list):
        return [_fill(each, value) for each in ours]
    return value if ours == "$" else ours


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Unreadable("must be a number") from None


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of our keys in our types: JSON writers give whole numbers as 5e8, and YAML reads "1e-4" as a text."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        kind = plain_kind(key) if key in schema_keys() else None
        if kind is int and isinstance(value, (str, float)) and _number(value).is_integer():
            value = int(_number(value))
        elif kind is float and isinstance(value, (str, int)) and not isinstance(value, bool):
            value = _number(value)
        elif kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        elif kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        elif kind == list[str] and isinstance(value, str):
            value = [each.strip() for each in value.split(",")]
        if isinstance(value, str) and "${" in value:
            raise Unreadable("must be the value itself, not ${...}")
        if key in schema_keys() and (rule := broken_rule(key, value)) is not None:
            raise Unreadable(f"here {key}: {rule}")
        made[key] = value
    return made


SECRET = re.compile(r"(hub_token|auth_token|api_?key|secret|password)$", re.IGNORECASE)


def printable(text: str) -> str:
    """Text in one line of printable characters."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def show(value: Any, name: str = "") -> str:
    """A file's value as one short line of printable characters. name: of its field; passwords are hidden."""
    if value and SECRET.search(name):
        return "***"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, (int, float)) and abs(value) >= 1e6 and float(f"{value:g}") == value:
        text = f"{value:g}"
    text = printable(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
