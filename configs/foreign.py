"""What names of other trainers are called here: `foreign.yaml` holds them, this module reads and looks them up.

An unknown key is answered from the table (`answer`, `absence`), `configs.imports` translates files by it (`look_up`),
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
    """What becomes of a field of another trainer's file."""

    translated = "translated"
    harmless = "harmless to drop"
    lost = "no counterpart"
    unknown = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the table.

    keys: how it is spelt here: key, key=value or group=option. note: what to know about it, or why it is dropped, or
    what is lost. default: theirs, or ABSENT. values: what each of their values is here, by its text in lower case.
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
        """The one key that takes the value as it is."""
        return self.keys[0] if len(self.keys) == 1 and self.keys[0] in schema_keys() else None

    def is_off(self, value: Any) -> bool:
        """Whether a lost field does nothing at this value."""
        return any(
            value == each and isinstance(value, bool) is isinstance(each, bool) for each in self.unless
        ) or value in ([], {})


@cache
def table() -> dict[str, dict[str, Entry]]:
    """The table by trainer: {"training_arguments": {"learning_rate": Entry(...), ...}, ...}."""
    text = (files("configs") / "foreign.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one takes a tenth of the time
    tree = yaml.load(text, Loader=loader)
    return {section: {str(name): entry(line) for name, line in names.items()} for section, names in tree.items()}


def entry(line: str | dict[str, Any]) -> Entry:
    """An entry as it is written in the table, or one of its `values` that is a text."""
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
    """The entry of a field by its name, dots between sections: itself, else the closest pattern that takes it."""
    names = table()[section]
    if name in names:
        return names[name]
    patterns = [each for each in names if "*" in each and fnmatchcase(name, each)]
    # `gradient_checkpointing_kwargs.*` holds for the section as a whole too.
    patterns += [each for each in names if each == f"{name}.*"]
    return names[max(patterns, key=len)] if patterns else None


@cache
def _by_name() -> dict[str, Entry]:
    """Entries by whole name and, where that says enough, by the last part of one. Earlier sections come first."""
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
    """How a key of another trainer is spelt here, or None. The whole key is looked up first, then its last part."""
    found = _named(key)
    if found is None or found.fate is not Fate.translated:
        return None
    spelling = ", ".join(found.keys)
    return f"{spelling} ({found.note})" if found.note else spelling


def absence(key: str) -> str | None:
    """Why there is no key for what another trainer calls so, or None where that is not known."""
    found = _named(key)
    return found.note if found is not None and found.fate is not Fate.translated else None
