"""Conversations of other trainers: their field and speaker names, as `data.fields` and `data.roles`."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

from configs.imports.fields import Unreadable

CHAT = ("chat_template", "sharegpt", "alpaca")
"""Forms of axolotl that `data=chat` reads."""
EVERYONE = ["system", "user", "assistant", "tool"]
OWN_TEXT = "the chat template writes the prompt, not the text of that form"
SHAREGPT = {"role": "from", "content": "value"}
"""Field names that rows of this form have by default."""


def renamed(names: Mapping[str, Any]) -> dict[str, Any]:
    """`data.fields`, from our names to theirs; empty if they are equal, or are those of a known form."""
    kept = {ours: theirs for ours, theirs in names.items() if theirs and theirs != ours}
    if {name: kept.get(name) for name in SHAREGPT} == SHAREGPT:
        kept = {ours: theirs for ours, theirs in kept.items() if ours not in SHAREGPT}
    return {"data.fields": kept} if kept else {}


def speakers(roles: Any) -> dict[str, Any]:
    """`data.roles` from lists of their names by ours: {"user": ["human", "customer"]}."""
    if not isinstance(roles, Mapping):
        raise Unreadable("must give names for each role: {user: [human], assistant: [gpt]}")
    found: dict[str, str] = {}
    for ours, theirs in cast("Mapping[str, Any]", roles).items():
        for each in theirs if isinstance(theirs, list) else [theirs]:
            if each != ours:
                found[str(each)] = ours
    return {"data.roles": found} if found else {}


def label_of(path: str, taken: Container[str]) -> str:
    """A name for a source of `data.mixture`."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.partition(".")[0]) or "source"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def together(sources: Mapping[str, dict[str, Any]], weights: Sequence[float] = ()) -> dict[str, Any]:
    """Our keys for several sources, each with its own keys: one list of files if nothing else differs and there are no
    weights, else a mixture."""
    rest = [{key: value for key, value in each.items() if key != "data.paths"} for each in sources.values()]
    if not weights and all(each == rest[0] for each in rest) and all("data.paths" in each for each in sources.values()):
        return {**rest[0], "data.paths": [path for each in sources.values() for path in each["data.paths"]]}
    mixture = {
        name: {key.removeprefix("data."): value for key, value in each.items()} for name, each in sources.items()
    }
    for name, weight in zip(mixture, weights, strict=False):
        mixture[name]["weight"] = weight
    return {"data.mixture": mixture}
