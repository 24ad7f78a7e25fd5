"""The overrides of a command line, checked one by one before Hydra composes them.

Hydra accepts an unknown key with `+` and silently accepts an unknown experiment; other mistakes get a page about its
search path. Here every override is looked up in the schema and in the groups' folders, and its value is checked against
the key's type. Each problem is one line: key, value, allowed values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, cast, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, QuotedString
from hydra.errors import HydraException

from configs import foreign
from configs.keys import PRESET_KEY, broken_rule, is_open, plain_kind, schema_keys
from configs.schema import Config

QUOTE_NUMBERS = "each must be a text; put quotes around what reads as a number, as true or as null: [\"1e5\",'0123']"

MOST_RUNS = 1_000
"""Of one sweep."""


def check_overrides(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each invalid override. groups: the options of each group, by its name."""
    return [problem for word in overrides if (problem := _check_word(word, groups)) is not None]


def settled(overrides: Sequence[str]) -> list[str]:
    """The overrides without the `+` and `++` that Hydra's users write where nothing is added: `++` before an existing
    key, either before a key of an open dictionary."""
    return [_settled(word) for word in overrides]


def _settled(word: str) -> str:
    plain = word.lstrip("+")
    key = plain.partition("=")[0]
    forced = word.startswith("++") and (key in schema_keys() or is_open(key))
    return plain if forced or (word.startswith("+") and is_open(key)) else word


def as_typed(word: str) -> str:
    """The same override; a text key keeps its characters if the value reads as a number, a bool or a date."""
    key, _, text = word.partition("=")
    if key not in schema_keys() or plain_kind(key) is not str:
        return word
    value = parse(word).value()
    # null is not quoted: it unsets the key.
    return f"{key}={quote_value(text.strip())}" if isinstance(value, (bool, int, float)) else word


def quote_value(text: str) -> str:
    """Quotes a text as an override's value, whatever characters it holds."""
    if re.fullmatch(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*", text):
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def _check_word(word: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    key, equals, value = word.partition("=")
    if word.startswith("+") and key.lstrip("+") in {**schema_keys(), **groups}:
        return f"{word}: {key.lstrip('+')} is there already; write {word.lstrip('+')}"
    if word[:1] in ("+", "~"):
        return f"{word}: no key can be added or removed; write {key.lstrip('+~')}=value, for a key that exists"
    if not equals or not key:
        return f"{word}: write key=value"
    if key in groups:
        return _check_option(key, value, groups[key])
    if key != PRESET_KEY and (key in schema_keys() or is_open(key)):
        return _check_value(key, word)
    return f"{word}: {unknown_key(key, groups)}"


def _check_option(group: str, value: str, options: Sequence[str]) -> str | None:
    if value in options or (group == "experiment" and value == "null"):
        return None
    return f"{group}={value}: no such option; choose {', '.join(options)}"


def _check_value(key: str, word: str) -> str | None:
    try:
        override = parse(word)
    # int() and the parser do not accept thousands of digits, or brackets a thousand deep.
    except (HydraException, ValueError, RecursionError):
        return unreadable_value(word)
    if override.is_sweep_override():
        return interval(word) if isinstance(override.value(), IntervalSweep) else unreadable_value(word)
    if key not in schema_keys():
        return None
    kind, value = plain_kind(key), cast(Any, override.value())
    if kind is str and isinstance(value, (bool, int, float)):
        value = word.partition("=")[2]
    elif get_args(kind)[-1:] == (str,) and not _all_texts(override):
        return f"{word}: {QUOTE_NUMBERS}"
    problem = broken_rule(key, value)
    return f"{word}: {problem}" if problem else None


def _all_texts(override: Override) -> bool:
    """Whether each element of a list or dictionary was typed as a text."""
    values = override._value  # pyright: ignore[reportPrivateUsage]  # .value() has dropped the quotes
    elements = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else []
    return all(isinstance(each, (str, QuotedString, list, dict)) for each in elements)


@lru_cache(256)
def parse(word: str) -> Override:
    """Parse an override by Hydra's grammar. Raises HydraException, ValueError or RecursionError if it is invalid."""
    return OverridesParser.create().parse_override(word)


def unreadable_value(word: str, *, sweep: bool = False) -> str:
    """For an override that Hydra's grammar refuses, or reads as a sweep's choices where one value is wanted. sweep:
    whether choices are wanted."""
    word = word.lstrip("+")
    key, _, value = word.partition("=")
    if "," in value and not value.startswith(("[", "{", "(")):
        if sweep:
            return f"{word}: no values of a sweep; write {key}=1,2,3 or {key}=range(1,10,3)"
        return f"{word}: one value expected; for a list write {key}=[{value}], for several runs add -m"
    example = '["a=b", "c d"]' if value.startswith("[") else '"..."'
    return f"{word}: the value cannot be read; close its brackets, or quote it: '{key}={example}'"


def too_many(overrides: Sequence[str]) -> str:
    """For overrides of a sweep that multiply to an absurd number of runs."""
    return f"{' '.join(overrides)}: more than {MOST_RUNS:,} runs; name fewer values, or make several sweeps"


def interval(word: str) -> str:
    """For a range without steps, which only other Hydra sweepers can search."""
    key = word.partition("=")[0]
    return (
        f"{word}: an interval needs a sweeper that searches it, Optuna's or Ax', and a sweep (-m) here runs every"
        f" value: list them, {key}=1,2,3, or write range(1,10,3)"
    )


def unknown_key(key: str, groups: Mapping[str, Sequence[str]]) -> str:
    """Why the key does not exist, and which key was probably meant."""
    if f"{key}.".startswith(f"{PRESET_KEY}."):
        name = key.removeprefix(PRESET_KEY)
        return f"these are the preset's published dimensions; set model.config{name}"
    inside = [name for name in schema_keys() if name.startswith(f"{key}.")]
    if inside:
        return f"is a section; set one of {', '.join(inside)}"
    section, _, name = key.rpartition(".")
    siblings = [other for other in schema_keys() if other.rpartition(".")[0] == section]
    known = foreign.answer(key)
    if known is not None:
        return f"no such key; here it is {known}"
    guess = _closest(key, name, siblings, groups)
    if guess is None and (reason := foreign.absence(key)) is not None:
        return f"no such key; there is none for it: {reason}"
    hint = f"; did you mean {guess}?" if guess else ""
    if section and siblings:
        return f"no such key{hint or ';'} {section} has {', '.join(other.rpartition('.')[2] for other in siblings)}"
    return f"no such key{hint or '; the sections are ' + ', '.join(f.name for f in dataclasses.fields(Config))}"


def _closest(key: str, name: str, siblings: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str | None:
    """The key that was probably meant: a similar sibling, the same name in another section, or any similar key."""
    nearby = get_close_matches(key, siblings, n=1, cutoff=0.8)
    same_name = [other for other in schema_keys() if other.rpartition(".")[2] == name]
    anywhere = get_close_matches(key, [*schema_keys(), *groups], n=1, cutoff=0.8)
    return next(iter([*nearby, *same_name, *anywhere]), None)
