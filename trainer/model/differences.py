"""Differences between a folder of weights and the model, and the lines that report them: file, tensor, remedy."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.schema import Model
from trainer.model.stored import Stored, some
from trainer.plan.model_fields import NAMES


@dataclass(kw_only=True, slots=True)
class Differences:
    """names: as in `Fit`. computed: not stored by design. shapes: {the model's name: (stored shape, wanted shape)}.
    broken: other problems, one line each."""

    names: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def any(self) -> bool:
        return bool(self.missing or self.unknown or self.shapes or self.broken)


def row(name: str) -> str:
    """A name without its numbers: equal for the same tensor of every layer."""
    return re.sub(r"\d+", "{}", name)


def describe_differences(
    found: Differences, stored: Mapping[str, Stored], choice: Model, *, grown: set[str], allowed: int
) -> Iterator[str]:
    """One line for each problem. grown: tensors that lack only rows for new tokens. allowed: missing ones to draw."""
    key = f"model.path={choice.path}"
    yield from (text if text.startswith(key) else f"{key}: {text}" for text in found.broken)
    files = sorted({tensor.file for tensor in stored.values()})
    where = files[0] if len(files) == 1 else f"{files[0]} ... {files[-1]}"
    layers = next((f"; take model.config.{name} away" for name in NAMES["layers"] if name in choice.config), "")
    if found.missing and not allowed:
        prefix = _wrapper(list(stored), found.missing)
        if prefix is not None:
            yield (
                f"{key}: the names in {where} begin with {prefix} ({some(list(stored), limit=1)}), which is a wrapper's"
                " and not the model's; save the model from inside of it, or rename them"
            )
            return
        yield (
            f"{key}: {where} lacks {some(found.missing)}{layers or '; give a whole model'}, or set"
            " model.missing_weights=random to draw such weights from train.seed"
        )
    if found.unknown:
        here = next((stored[name].file for name in found.unknown if name in stored), where)
        yield (
            f"{key}: {here} holds {some(found.unknown)}, which the model does not have and would ignore"
            f"{layers or '; give the config.json that belongs to these weights'}"
        )
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, pair in found.shapes.items():
        alike[(row(name), *pair)].append(name)
    for (_, was, now), names in alike.items():
        remedy = "take model.config overrides of sizes away" if choice.config else "its config.json is of another model"
        if names[0] in grown:
            remedy = "set model.resize_vocabulary=true to add rows for new tokens"
        held = [found.names.get(name, name) for name in names]
        file = f"{stored[held[0]].file} holds" if held[0] in stored else f"{where} makes"
        yield f"{key}: {file} {some(held, limit=1)} of shape {list(was)}, the model wants {list(now)}; {remedy}"


def _wrapper(names: list[str], missing: list[str]) -> str | None:
    """The prefix that all stored names have and the model's do not, if without it one of them would fit."""
    first = names[0].split(".")
    wanted = set(missing)
    for length in range(1, len(first)):
        prefix = ".".join(first[:length]) + "."
        if not all(name.startswith(prefix) for name in names):
            return None
        if any(name.removeprefix(prefix) in wanted for name in names):
            return prefix
    return None
