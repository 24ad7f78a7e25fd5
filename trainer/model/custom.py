"""A user's own model, by the path of its class: `model.target=package.module.Class`.

The class derives from PreTrainedModel and has its own config class, so it can be registered with transformers' Auto
classes. From then on it is an architecture like those of transformers: every layout divides it, the estimator traces it
on the meta device, checks build it in miniature, and an exported folder names it. Its settings are `model.config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.by_path import find
from configs.errors import ConfigError, PlanError
from configs.files import read_text
from configs.load import from_yaml
from configs.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def introduce(model: Model) -> str | None:
    """Register the class that `model.target` names with transformers. Returns its model_type; None if none is named.

    Raises PlanError, with every problem, for a path that is not such a class.
    """
    return None if model.target is None else _introduced(model.target)


def introduce_of_run(folder: Path) -> None:
    """The same for the run that a folder belongs to: its checkpoint, or its exported model."""
    for above in list(folder.absolute().parents)[:3]:
        if (above / "config.yaml").is_file():
            try:
                config = from_yaml(read_text(above / "config.yaml"))
            except ConfigError:  # a foreign folder, which need not lie in a run
                continue
            introduce(config.model)
            return


def _introduced(path: str) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = _class_of(path)
    kind: Any = found.config_class
    # Each time: both keep the last registration, which may be another class with the same config class.
    AutoConfig.register(kind.model_type, kind, exist_ok=True)
    AutoModelForCausalLM.register(kind, found, exist_ok=True)
    return kind.model_type


def _class_of(path: str) -> type[PreTrainedModel]:
    from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

    key = f"model.target={path}"
    found = find(path, key)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise PlanError(f"{key}: is no subclass of transformers.PreTrainedModel; derive it from that")
    kind: Any = found.config_class
    if not (isinstance(kind, type) and issubclass(kind, PretrainedConfig)) or not kind.model_type:
        raise PlanError(
            f"{key}: has no config class with a model_type; set config_class to a subclass of"
            " transformers.PretrainedConfig that has one"
        )
    # Its `get` does not find entries that are loaded on demand.
    owner: Any = CONFIG_MAPPING[kind.model_type] if kind.model_type in CONFIG_MAPPING else kind  # noqa: SIM401
    if _name(owner) != _name(kind) or kind.__module__.startswith("transformers."):
        raise PlanError(
            f"{key}: its model_type {kind.model_type} is that of {owner.__module__}.{owner.__name__}; derive a config"
            " class with a model_type of its own, so that a saved folder tells which class reads it"
        )
    return found


def _name(kind: type) -> tuple[str, str]:
    """Equal for a class and its next definition, such as a re-run notebook cell."""
    return kind.__module__, kind.__qualname__
