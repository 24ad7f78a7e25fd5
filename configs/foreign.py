"""Names of other trainers and their counterparts here: `foreign.yaml` holds them, this module looks them up.

The table answers an unknown key (`answer`, `absence`), `configs.imports` translates files with it (`look_up`),
and docs/coming-from.md is made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from configs.keys import schema_keys

ABSENT = object()
OFF = (None, False, 0, "", "none", "no", "None")


class Fate(StrEnum):
    """The fate of a field of another trainer's file."""

    translated = "translated"
    harmless = "harmless to drop"
    lost = "no counterpart"
    unknown = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the table.

    keys: our spelling: key, key=value or group=option. note: remark, reason for dropping the field, or what is lost.
    default: their default, or ABSENT. values: our value for each of theirs, by its text in lower case.
    """

    fate: Fate
    keys: tuple[str, ...] = ()
    note: str = ""
    default: Any = ABSENT
    times: float | None = None
    unless: tuple[Any, ...] = OFF
    values: dict[str, Any] | None = None

    @property
    def key(self) -> str | None:
        """The one key that takes the value unchanged."""
        return self.keys[0] if len(self.keys) == 1 and self.keys[0] in schema_keys() else None

    def is_off(self, value: Any) -> bool:
        """Whether a lost field has no effect at this value."""
        return any(
            value == each and isinstance(value, bool) is isinstance(each, bool) for each in self.unless
        ) or value in ([], {})


@cache
def table() -> dict[str, dict[str, Entry]]:
    """The table by trainer: {"training_arguments": {"learning_rate": Entry(...), ...}, ...}."""
    text = (files("configs") / "foreign.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader takes a tenth of the time
    tree = yaml.load(text, Loader=loader)
    return {section: {str(name): entry(line) for name, line in names.items()} for section, names in tree.items()}


def entry(line: str | dict[str, Any]) -> Entry:
    """An entry as written in the table, or one of its `values` that is a text."""
    more: dict[str, Any] = line if isinstance(line, dict) else {"is": line}
    head, _, note = more["is"].partition("; ")
    fate = {"drop": Fate.harmless, "lost": Fate.lost}.get(head, Fate.translated)
    values = more.get("values")
    return Entry(
        fate=fate,
        keys=tuple(head.split(", ")) if fate is Fate.translated else (),
        note=note,
        default=more.get("default", ABSENT),
        times=more.get("times"),
        unless=tuple(more["unless"]) if "unless" in more else OFF,
        values={str(value).lower(): here for value, here in values.items()} if values else None,
    )


def look_up(section: str, name: str) -> Entry | None:
    """The entry for a field name (dots between sections): the name itself, else the closest matching pattern."""
    names = table()[section]
    if name in names:
        return names[name]
    patterns = [each for each in names if "*" in each and fnmatchcase(name, each)]
    # `gradient_checkpointing_kwargs.*` holds for the section as a whole too.
    patterns += [each for each in names if each == f"{name}.*"]
    return names[max(patterns, key=len)] if patterns else None


@cache
def _by_name() -> dict[str, Entry]:
    """Entries by whole name and, where unambiguous, by the last part of a name. Earlier sections come first."""
    own = {key.rpartition(".")[2] for key in schema_keys()} | {key.partition(".")[0] for key in schema_keys()}
    found: dict[str, Entry] = {}
    for names in table().values():
        for name, line in names.items():
            last = name.rpartition(".")[2]
            if "*" not in name and name not in own:
                found.setdefault(name, line)
            if "_" in last and "*" not in last and last not in own:
                found.setdefault(last, line)
    return found


def _named(key: str) -> Entry | None:
    key = key.replace("-", "_")
    names = _by_name()
    section, _, last = key.rpartition(".")
    return names.get(key) or names.get(last) or (names.get(f"fsdp_{last}") if section == "parallel.fsdp" else None)


def answer(key: str) -> str | None:
    """Our spelling of another trainer's key, or None. The whole key is looked up first, then its last part."""
    found = _named(key)
    if found is None or found.fate is not Fate.translated:
        return None
    spelling = ", ".join(found.keys)
    return f"{spelling} ({found.note})" if found.note else spelling


def absence(key: str) -> str | None:
    """Why another trainer's key has no counterpart here, or None if unknown."""
    found = _named(key)
    return found.note if found is not None and found.fate is not Fate.translated else None
