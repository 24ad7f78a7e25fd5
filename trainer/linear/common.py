"""Answers that most kinds share. A module imports those that it uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from configs.schema import Config, Tuning

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def imitate(model: PreTrainedModel, config: Config) -> None:
    """It adds no parameters, or refuses tensor parallel, the only caller."""


def owns(name: str) -> bool:
    return False


def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
    """It adds no parameters."""


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    """It adds nothing to a checkpoint."""


def matmuls() -> set[object]:
    """Its matmuls are those of plain layers."""
    return set()


def settle(modules: Iterable[nn.Module]) -> None:
    """Nothing depends on the values."""


def words(config: Config) -> str:
    return ""


def divides(shape: Iterable[int], block: int) -> bool:
    return all(side % block == 0 for side in shape)


def base_of(config: Config) -> dict[str, Any]:
    """The part of an identity that names the frozen base model, which is not saved."""
    model = config.model
    return {"tuning.base": [str(model.weights), model.path, model.revision]}
