"""The plain kind: every weight of the model is trained, except those that get no gradient from text.

These are frozen under every layout: DDP would wait for their gradients, and checkpoints for their states.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from configs.choices import TuningMethod
from configs.schema import Config
from trainer.linear.common import description, exported, fill, imitate, owns, restore, settle  # noqa: F401

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
KEEPS_MODEL = True
SHOWN = 6


def chosen(config: Config) -> bool:
    return config.tuning.method is TuningMethod.full


def problems(config: Config) -> Iterator[str]:
    yield from ()


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
    for name in untrained:
        model.get_parameter(name).requires_grad_(False)


def report(model: PreTrainedModel) -> None:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        log.info("frozen: %d parameters get no gradient from text: %s", len(frozen), patterns_of(frozen))


def identity(config: Config) -> dict[str, Any]:
    return {}


def matmuls() -> set[object]:
    import torch

    return {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def traced(config: Config) -> Any:
    return None


def patterns_of(names: Iterable[str]) -> str:
    """The names with * for a layer's number, each once, and at most a few of them."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(patterns) - SHOWN} more" if len(patterns) > SHOWN else ""
    return ", ".join(patterns[:SHOWN]) + more
