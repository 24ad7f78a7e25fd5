"""YAML files and command-line overrides in, one typed `Config` out. Reads nothing else and needs no torch.

    python -m launch model=gpt2 parallel=zero2 train.steps=500

is composed from left to right: the defaults of `schema.py`, the group files that `config.yaml` names (here
with `model/gpt2.yaml` and `parallel/zero2.yaml` chosen), the experiment if one is given, the single keys.
The same overrides give the same `Config` on every rank: nothing in the YAML asks for the time, the
environment or Hydra's state.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.schema import Config

HYDRA_VERSION_BASE = "1.3"
# Dictionaries of the schema whose keys are not ours to list: adding one needs no `+`.
OPEN_KEYS = ("model.config.", "logging.options.")


def register_schema() -> None:
    """Make the dataclasses known to Hydra under the name `schema`, first in config.yaml's defaults."""
    ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: Sequence[str] = (), *, config_dir: str | None = None) -> Config:
    """Compose the configuration.

    overrides: as typed on the command line. config_dir: a further folder of groups, searched as well as ours.
    Raises ConfigError with the offending key, value and what is allowed.
    """
    register_schema()
    GlobalHydra.instance().clear()
    words = [open_key(word) for word in overrides]
    if config_dir is not None:
        folder = Path(config_dir).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir={config_dir}: no such folder; give one that holds group folders")
        words.append(f"hydra.searchpath=[file://{folder}]")
    try:
        with initialize_config_module("configs", version_base=HYDRA_VERSION_BASE):
            composed = compose("config", overrides=words)
        return to_config(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from None
    finally:
        GlobalHydra.instance().clear()


def open_key(override: str) -> str:
    """Let `model.config.new=1` add a key; Hydra would ask for `+` there."""
    return f"++{override}" if override.startswith(OPEN_KEYS) else override


def to_config(composed: DictConfig) -> Config:
    """Check a composed tree against the schema once more and make it plain dataclasses.

    Hydra accepts `+parallel.tpp=2`, and the key would then be silently ignored. The second merge refuses it.
    """
    plain = OmegaConf.to_container(composed, resolve=True)
    checked = OmegaConf.merge(OmegaConf.structured(Config), plain)
    return cast(Config, OmegaConf.to_object(checked))


def explain(error: Exception) -> str:
    """One line from an exception of Hydra or OmegaConf: key, value, rule and the valid choices."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = str(cause) if str(cause) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("reference_type", "object_type", "Set the environment"))]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    lines = [line for line in lines if not line.startswith(("full_key: ", "To append to your config"))]
    message = re.sub(r"\s+", " ", " ".join(lines))
    hint = _known_keys(key)
    return f"{key}: {message}{hint}" if key else message + hint


def _known_keys(full_key: str) -> str:
    """For a misspelt key: the keys of the group it was looked for in."""
    if not full_key:
        return ""
    parent, _, name = full_key.rpartition(".")
    node: object = asdict(Config())
    for part in parent.split(".") if parent else []:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name in node:
        return ""
    return f"; known keys here: {', '.join(node)}"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, in the schema's order. `from_yaml` gives back an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """Read what `to_yaml` wrote. Raises ConfigError on unknown keys and wrong types."""
    try:
        return to_config(OmegaConf.create(yaml.safe_load(text)))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from None
