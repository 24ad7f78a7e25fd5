"""Answers that most kinds share. A module imports those that it uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.schema import Config, Tuning

if TYPE_CHECKING:
    import torch
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


def exported(described: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    from trainer.model.peft import stored_name

    return {stored_name(name): tensor for name, tensor in tensors.items()}


def matmuls() -> set[object]:
    """Its matmuls are those of plain layers."""
    return set()


def settle(modules: Iterable[nn.Module]) -> None:
    """Nothing depends on the values."""


def description(config: Config) -> str:
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBits:
    """How layers multiply in 8 bits. step: what must divide each side of a matrix, so that each rank's part of it can
    be multiplied. backward: of the two products of a layer's backward, those in 8 bits. gathered: whether FSDP2
    gathers their weights so."""

    step: int
    backward: int
    gathered: bool

    def converted(self, shapes: Iterable[Sequence[int]]) -> list[Sequence[int]]:
        """Of the matrices that one process would convert."""
        return [shape for shape in shapes if divides(shape, self.step)]


def divides(shape: Iterable[int], block: int) -> bool:
    return all(side % block == 0 for side in shape)


def base_of(config: Config) -> dict[str, Any]:
    """The part of an identity that names the frozen base model, which is not saved."""
    model = config.model
    return {"tuning.base": [str(model.weights), model.path, model.revision]}
