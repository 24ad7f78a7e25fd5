"""Composes a command line without Hydra where possible: options of this package and single keys, by section.

Each of our options sets only keys of its own section, so each section is composed once per process and the tree is put
together from sections. Hydra needs a third of a second for the whole tree on a slow machine, before the first line is
printed and again for each layout of a sweep. Hydra composes overrides that choose an experiment or a user's option,
and whatever fails here, for its message.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.overrides import parse
from configs.schema import Config

NAMES = tuple(field.name for field in dataclasses.fields(Config))
MOST_MADE = 2_000
_made: dict[tuple[str, str], Any] = {}


def own_folder() -> Path:
    return Path(str(files("configs")))


@cache
def schema() -> DictConfig:
    return OmegaConf.structured(Config)


@cache
def own_options() -> dict[str, list[str]]:
    """The options of every group in this package: {"parallel": ["ddp", "single", ...], ...}. Read-only."""
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in own_folder().iterdir()}
    return {group: found[group] for group in sorted(found) if found[group]}


@cache
def section(name: str, option: str | None) -> DictConfig:
    """{name: values} that one of our options sets, with the schema's types. Read-only."""
    made = OmegaConf.masked_copy(schema(), name)
    if option is not None:
        made = cast(DictConfig, OmegaConf.merge(made, {name: OmegaConf.load(own_folder() / name / f"{option}.yaml")}))
    return made


@cache
def _plain(name: str, option: str | None) -> Any:
    return cast(dict[str, Any], OmegaConf.to_container(section(name, option)))[name]


def made(name: str, option: str) -> Any:
    """The section of one of our options as its dataclass: Parallel(...)."""
    return cast(dict[str, Any], OmegaConf.to_object(section(name, option)))[name]


@cache
def _usual_choices() -> dict[str, str | None]:
    """The option that config.yaml names for each group, the last group first, as Hydra lists them."""
    entries = cast(list[Any], yaml.safe_load((own_folder() / "config.yaml").read_text())["defaults"])
    pairs = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return {
        group.removeprefix("optional "): option
        for group, option in reversed(pairs)
        if not group.startswith("override ")
    }


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The tree and the chosen options, as Hydra composes them; None if only Hydra can. overrides: as Hydra gets
    them, each looked up before. The tree is read-only."""
    choices, keys = dict(_usual_choices()), list[str]()
    for word in overrides:
        key, _, text = word.partition("=")
        if key not in choices:
            keys.append(word)
        elif text in own_options()[key]:
            choices[key] = text
        else:
            return None
    if choices["experiment"] is not None:
        return None
    try:
        tree = {name: _plain(name, choices.get(name)) for name in NAMES}
        tree |= _with_keys(keys, choices)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError):
        return None
    return tree, cast(dict[str, str], choices)


def _with_keys(overrides: Sequence[str], choices: Mapping[str, str | None]) -> dict[str, Any]:
    """The sections that single keys change, with these keys."""
    changed: dict[str, DictConfig] = {}
    for word in overrides:
        override = parse(word)
        if override.package is not None:
            raise HydraException(word)
        name = override.key_or_group.partition(".")[0]
        if name not in changed:
            changed[name] = copy.deepcopy(section(name, choices.get(name)))
            OmegaConf.set_struct(changed[name], True)
        # As `ConfigLoaderImpl._apply_overrides_to_config` of Hydra.
        OmegaConf.update(
            changed[name], override.key_or_group, override.value(), merge=True, force_add=override.is_force_add()
        )
    return {name: cast(dict[str, Any], OmegaConf.to_container(each))[name] for name, each in changed.items()}


def typed(tree: Mapping[str, Any]) -> Config:
    """The tree as dataclasses of the schema, with converted values. tree: without interpolations. Raises
    OmegaConfBaseException for values that the schema does not accept."""
    try:
        return Config(**{name: _typed(name, value) for name, value in tree.items()})
    except (OmegaConfBaseException, KeyError):
        # Convert the whole tree again: its error names the full key.
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema(), OmegaConf.create(dict(tree)))))


def _typed(name: str, value: Any) -> Any:
    """Sections with equal values are converted once; callers get a copy that they may change."""
    key = name, repr(value)
    if key not in _made:
        if len(_made) >= MOST_MADE:
            _made.clear()
        checked = OmegaConf.merge(section(name, None), OmegaConf.create({name: value}))
        _made[key] = cast(dict[str, Any], OmegaConf.to_object(checked))[name]
    return copy.deepcopy(_made[key])
