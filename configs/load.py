"""YAML files and command-line overrides in, one typed `Config` out. Reads nothing else and needs no torch.

    python -m launch model=gpt2 parallel=zero2 train.steps=500

is composed from left to right: the defaults of `schema.py`, the group files that `config.yaml` names (here
with `model/gpt2.yaml` and `parallel/zero2.yaml` chosen), the experiment if one is given, the single keys.
The same overrides give the same `Config` on every rank: no YAML file asks for the time. Every number is checked against
its range before the `Config` is returned, so later code need not check again. If the run continues from an adapter,
`adapter_folder` reads its settings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import files as user_files
from configs import sections
from configs.adapter_folder import adopt
from configs.errors import ConfigError
from configs.explain import explain
from configs.interpolation import CLOCK, Resolved, on_record, remember
from configs.keys import broken_rule, is_open, plain_kind, schema_keys
from configs.overrides import (
    MOST_RUNS,
    as_typed,
    check_overrides,
    interval,
    quote_value,
    settled,
    too_many,
    unreadable_value,
)
from configs.ranges import check_ranges
from configs.schema import Config

HYDRA_VERSION_BASE = "1.3"


def load_config(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> Config:
    """Compose the configuration.

    overrides: as typed on the command line. config_dir: a further folder of groups, searched as well as ours.
    Raises ConfigError with one line for each problem: the key, the value and what is allowed.
    """
    return _compose(overrides, config_dir)[0]


def chosen_options(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> dict[str, str]:
    """The chosen option of each group, the last group of config.yaml first. Raises ConfigError as `load_config`."""
    return _compose(overrides, config_dir)[1]


def load_chosen(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> tuple[Config, dict[str, str]]:
    """Config and options, composed once."""
    return _compose(overrides, config_dir)


@cache
def usual() -> tuple[Config, dict[str, str]]:
    """The configuration without overrides, and its options. Read-only."""
    return _compose((), None)


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """The options of every group, from the YAML files on disk: {"parallel": ["ddp", "single", ...], ...}."""
    folders = _user_folder(config_dir)
    return {
        name: sorted(
            {*own, *(each.stem for folder in folders for each in folder.glob(f"{name}/*.yaml") if not each.is_dir())}
        )
        for name, own in sections.own_options().items()
    }


@cache
def composed_options(group: str) -> dict[str, Any]:
    """Each of our options of a group, as its file sets it over the schema: {"ddp": Parallel(...), ...}."""
    return {option: sections.made(group, option) for option in sections.own_options()[group]}


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a sweep: `a=1,2 b=3,4` gives four lists of overrides. `range(1,5)` and `glob(*)` work too."""
    with _hydra():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        choices = [_choices(parser, word) for word in overrides]
    if prod(map(len, choices)) > MOST_RUNS:
        raise ConfigError(too_many([word for word, each in zip(overrides, choices, strict=True) if len(each) > 1]))
    return [list(run) for run in product(*choices)]


def _choices(parser: OverridesParser, word: str) -> list[str]:
    """The overrides that one override of a sweep stands for: itself, unless it lists several values."""
    key, equals, text = word.partition("=")
    if not equals:
        return [word]
    try:
        override = parser.parse_overrides([word])[0]
        if not override.is_sweep_override():
            return [word]
        value = override.value()
        if isinstance(value, IntervalSweep):
            raise ConfigError(interval(word))
        if isinstance(value, RangeSweep) and _length(value) > MOST_RUNS:
            raise ConfigError(too_many([word]))
        values = list(override.sweep_string_iterator())
    except (HydraException, ArithmeticError, ValueError, RecursionError):
        raise ConfigError(unreadable_value(word, sweep=True)) from None
    if not values:
        raise ConfigError(f"{word}: stands for no value; write {key}=1,2,3, or a range or pattern that holds some")
    if key in schema_keys() and plain_kind(key) is str and isinstance(value, ChoiceSweep) and value.simple_form:
        # A text keeps its characters: 1e5 is not 100000.0, unless a comma stands inside quotes.
        typed = [each.strip() for each in text.split(",")]
        values = typed if len(typed) == len(values) else values
    return [f"{key}={each}" for each in values]


def _length(values: RangeSweep) -> float:
    """The approximate number of values. Raises ValueError or ArithmeticError if it cannot be counted."""
    start, stop, step = (Fraction(str(each)) for each in (values.start, values.stop, values.step))
    return float((stop - start) / step)


def _compose(overrides: Sequence[str], config_dir: str | None) -> tuple[Config, dict[str, str]]:
    overrides = settled(overrides)
    folders = _user_folder(config_dir)
    groups = group_options(config_dir)
    problems = check_overrides(overrides, groups)
    if problems:
        raise ConfigError(*problems)
    overrides = _without_null(overrides)
    # Hydra needs a + for a new key; the open dictionaries of the schema need none.
    prepared = [f"++{word}" if is_open(word.partition("=")[0]) else as_typed(word) for word in overrides]
    found = sections.composed(prepared)
    if found is None:
        try:
            found = by_hydra(prepared, folders)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(explain(error, overrides=overrides, groups=groups)) from None
        except RecursionError:
            raise ConfigError(_endless(folders, overrides)) from None
    tree, chosen = found
    _check_names(chosen, folders)
    return _ranged(to_config(tree), overrides), chosen


def _without_null(overrides: Sequence[str]) -> Sequence[str]:
    """The overrides without `experiment=null` and earlier experiments: Hydra accepts no null on a command line."""
    chosen = [word for word in overrides if word.startswith("experiment=")]
    return [word for word in overrides if word not in chosen] if chosen[-1:] == ["experiment=null"] else overrides


def by_hydra(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree and the option of each group."""
    quoted = [quote_value(f"{user_files.SCHEME}://{folder}") for folder in folders]
    with _hydra():
        path = [f"hydra.searchpath=[{each}]" for each in quoted]
        every = cast(
            Any, OmegaConf.to_container(compose("config", overrides=[*overrides, *path], return_hydra_config=True))
        )
    choices = cast(dict[str, str], every["hydra"]["runtime"]["choices"])
    chosen = {group: option for group, option in choices.items() if "/" not in group}
    return {name: every[name] for name in sections.NAMES}, chosen


def _ranged(config: Config, overrides: Sequence[str]) -> Config:
    """The config, if every number lies in its range, with the settings of an adapter that it names."""
    if problems := [*check_ranges(config)]:
        raise ConfigError(*problems)
    adopt(config, {word.partition("=")[0].lstrip("+") for word in overrides})
    return config


def from_hydra(composed: DictConfig) -> Config:
    """Takes the tree that a Hydra application composed. Keys next to ours belong to the application, and ours may refer
    to them.

    Raises ConfigError with every problem, also for the time in a value where each of several ranks would read its own.
    """
    every = cast(dict[str, Any], OmegaConf.to_container(composed))
    ours = {f.name for f in dataclasses.fields(Config)}
    tree = {name: value for name, value in every.items() if name in ours}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (timed := [*_timed(every, "")]):
        raise ConfigError(*(f"{key}: each rank would read its own clock; give the time as a text" for key in timed))
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    others = {name: value for name, value in every.items() if name not in ours}
    return _ranged(to_config(tree, others=others), list(given))


def _timed(value: Any, key: str) -> Iterator[str]:
    """key=value of each text that contains the time."""
    if isinstance(value, dict):
        for name, each in cast(dict[str, Any], value).items():
            yield from _timed(each, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, each in enumerate(cast(list[Any], value)):
            yield from _timed(each, f"{key}[{number}]")
    elif isinstance(value, str) and CLOCK.search(value):
        yield f"{key}={value}"


def _endless(folders: Sequence[Path], overrides: Sequence[str]) -> str:
    """For a recursion that a user's file, or brackets in an override, can cause."""
    named = [file for folder in folders for word in overrides for file in folder.glob(f"{word.replace('=', '/')}.yaml")]
    where = f"{named[0]}" if named else " ".join(overrides)
    return f"{where}: a defaults list leads back to a file that names it; take that entry out"


def _check_names(chosen: Mapping[str, str], folders: Sequence[Path]) -> None:
    """Raises ConfigError for a user's file that one of ours would hide."""
    ours = sections.own_folder()
    for folder in folders:
        for group, option in chosen.items():
            file = f"{group}/{option}.yaml"
            if (folder / file).exists() and (ours / file).exists():
                raise ConfigError(f"{folder / file}: {group}={option} is an option of this package; rename the file")


@contextmanager
def _hydra() -> Generator[None, None, None]:
    """Hydra's global state with our package as the primary source and our schema registered. It is restored at the end,
    because it may belong to a Hydra application that calls us."""
    known = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    introduce()
    try:
        with initialize_config_module("configs", version_base=HYDRA_VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().hydra = known


@cache
def introduce() -> None:
    """Register our schema and the users' folders with Hydra, which keeps both."""
    ConfigStore.instance().store(name="schema", node=Config)
    user_files.register()


def _user_folder(config_dir: str | None) -> list[Path]:
    if config_dir is None:
        return []
    folder = Path(config_dir).expanduser().resolve()
    if not config_dir or not folder.is_dir():
        raise ConfigError(f"--config-dir={config_dir}: no such folder; give one that holds group folders")
    return [folder]


def to_config(tree: Mapping[str, Any], *, tolerant: bool = False, others: Mapping[str, Any] | None = None) -> Config:
    """Resolve a tree, check it against the schema and make it plain dataclasses.

    tolerant: keep an interpolation that cannot be resolved.
    others: sections outside the schema to which the tree may refer.
    Raises ConfigError with every problem."""
    resolved = Resolved(tree, others or {})
    problems = [f"{key}={text}: {reason}" for key, text, reason in resolved.problems]
    failed = {key for key, _, _ in resolved.problems}
    if tolerant:
        problems = []
    for key in schema_keys().keys() - failed:
        value = _look_up(resolved.values, key)
        if value is not ABSENT and (problem := broken_rule(key, value)) is not None:
            problems.append(f"{key}={value}: {problem}")
    if problems:
        raise ConfigError(*problems)
    try:
        config = sections.typed(on_record(resolved.values))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
    remember(config, resolved.sources)
    return config


ABSENT = object()


def _look_up(tree: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return ABSENT
        tree = cast(dict[str, Any], tree)[name]
    return tree


def record(config: Config) -> dict[str, Any]:
    """The configuration as written and shown: environment values appear as `${oc.env:NAME}`."""
    return on_record(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """The configuration as YAML, in the schema's order. `from_yaml` gives back an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(record(config)))


def from_yaml(text: str, *, where: str = "config.yaml") -> Config:
    """Read the output of `to_yaml`; an environment value that is not set here keeps its source text. Raises ConfigError
    on unknown keys and wrong types."""
    return to_config(user_files.read_tree(text, where=where, package=""), tolerant=True)
