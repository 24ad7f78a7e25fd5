"""YAML files and command-line overrides in, one typed `Config` out. Reads nothing else and needs no torch.

    python -m launch model=gpt2 parallel=zero2 train.steps=500

is composed from left to right: the defaults of `schema.py`, the group files that `config.yaml` names (here
with `model/gpt2.yaml` and `parallel/zero2.yaml` chosen), the experiment if one is given, the single keys.
The same overrides give the same `Config` on every rank: nothing in the YAML asks for the time, the
environment or Hydra's state.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import cast

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.explain import explain, unreadable_value
from configs.overrides import check_overrides, is_open
from configs.schema import Config

HYDRA_VERSION_BASE = "1.3"


def load_config(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> Config:
    """Compose the configuration.

    overrides: as typed on the command line. config_dir: a further folder of groups, searched as well as ours.
    Raises ConfigError with one line for each problem: the key, the value and what is allowed.
    """
    return _compose(overrides, config_dir)[0]


def chosen_options(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> dict[str, str]:
    """The option that each group ends up with, in the order of config.yaml. Raises ConfigError as `load_config`."""
    return _compose(overrides, config_dir)[1]


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """The options of every group, from the YAML files on disk: {"parallel": ["ddp", "single", ...], ...}."""
    ours = Path(str(files("configs")))
    names = sorted(folder.name for folder in ours.iterdir() if any(folder.glob("*.yaml")))
    folders = [ours, *_user_folder(config_dir)]
    return {name: sorted({file.stem for folder in folders for file in folder.glob(f"{name}/*.yaml")}) for name in names}


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The runs of a sweep: `a=1,2 b=3,4` gives four lists of overrides. `range(1,5)` and `glob(*)` work too."""
    with _hydra():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        return [list(run) for run in product(*(_choices(parser, word) for word in overrides))]


def _choices(parser: OverridesParser, word: str) -> list[str]:
    """The words that one word of a sweep stands for: itself, unless it lists several values."""
    key, equals, _ = word.partition("=")
    if not equals:
        return [word]
    try:
        override = parser.parse_overrides([word])[0]
        return (
            [f"{key}={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else [word]
        )
    except HydraException:
        raise ConfigError(unreadable_value(word)) from None


def _compose(overrides: Sequence[str], config_dir: str | None) -> tuple[Config, dict[str, str]]:
    search = [f"hydra.searchpath=[file://{folder}]" for folder in _user_folder(config_dir)]
    groups = group_options(config_dir)
    problems = check_overrides(overrides, groups)
    if problems:
        raise ConfigError(*problems)
    try:
        with _hydra():
            # Hydra asks for a + where a key is new; in the open dictionaries of the schema none is needed.
            words = [f"++{word}" if is_open(word.partition("=")[0]) else word for word in overrides]
            composed = compose("config", overrides=[*words, *search], return_hydra_config=True)
            choices = cast(dict[str, str], OmegaConf.to_container(composed.hydra.runtime.choices))
            ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            return to_config(ours), {group: option for group, option in choices.items() if "/" not in group}
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(explain(error, overrides=overrides, groups=groups)) from None


@contextmanager
def _hydra() -> Generator[None, None, None]:
    """Hydra's global state with our package as the primary source and our schema known, put back at the end."""
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_module("configs", version_base=HYDRA_VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().clear()


def _user_folder(config_dir: str | None) -> list[Path]:
    if config_dir is None:
        return []
    folder = Path(config_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={config_dir}: no such folder; give one that holds group folders")
    return [folder]


def to_config(composed: DictConfig) -> Config:
    """Check a composed tree against the schema once more and make it plain dataclasses.

    A YAML file may add keys that Hydra accepts in the open parts of a tree and that would then be silently ignored.
    The second merge refuses them.
    """
    plain = OmegaConf.to_container(composed, resolve=True)
    checked = OmegaConf.merge(OmegaConf.structured(Config), plain)
    return cast(Config, OmegaConf.to_object(checked))


def quote_value(text: str) -> str:
    """A text as an override's value, whatever characters it holds."""
    if re.fullmatch(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*", text):
        return text
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the schema's order. `from_yaml` gives back an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote. Raises ConfigError on unknown keys and wrong types."""
    try:
        return to_config(cast(DictConfig, OmegaConf.create(yaml.safe_load(text))))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(explain(error)) from None
