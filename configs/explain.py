"""Errors of Hydra, OmegaConf and YAML, each rewritten as one line: file or key, value, rule.

The original texts name Python types and search paths. We keep the key, its file and the value; the rule comes from
the schema's types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from configs.files import broken_yaml
from configs.keys import value_rule
from configs.overrides import unknown_key, unreadable_value


def explain(
    error: Exception, *, overrides: Sequence[str] = (), groups: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One line for an error raised while composing `overrides`. groups: the options of each group."""
    if isinstance(error, yaml.MarkedYAMLError):
        return broken_yaml(error)
    text = re.sub(r"\s+", " ", f"{error} {error.__cause__ or ''}")
    word = str(getattr(error, "override", "")) or _search(r"Ambiguous value for argument '(.*?)' 1\.", text)
    if word:
        return unreadable_value(word)
    option = re.search(r"Could not (?:find|load|override) '([^'/]+)[/@]([^']*)'", text)
    if option:
        choices = ", ".join((groups or {}).get(option[1], ())) or "none: there is no such group"
        return f"{option[1]}={option[2]}: no such option; choose {choices}"
    key = _search(r"full_key: (\S+)", text)
    file = _search(r"In '(.+?)': \w+ raised", text)
    where = f"{file}.yaml: " if file else ""
    rule = value_rule(key)
    if rule is not None:
        return f"{where}{key}={_value(key, text, overrides)}: {rule}"
    if "not in '" in text:
        return f"{where}{key}: {unknown_key(key, groups or {})}"
    message = re.sub(r"^.*?composing config: | full_key:.*", "", text).strip()
    return f"{where}{key}: {message}" if key else f"{where}{message}"


def _value(key: str, text: str, overrides: Sequence[str]) -> str:
    """The refused value: as it was typed, else as the error quotes it."""
    typed = {word.partition("=")[0]: word.partition("=")[2] for word in overrides}
    if key in typed:
        return typed[key]
    quoted = _search(r"[Vv]alue:? '(.*?)'", text) or "..."
    return "null" if quoted == "None" or "not Optional" in text else quoted


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
