"""Compose, plan, estimate, search, train and launch from Python: what the command line does, as functions.

    from cookbook import compose, estimate, train

    config = compose("model=tiny", "parallel=single", "train.steps=20")
    print(estimate(config).busiest.peak_allocated_bytes)
    result = train(config)
    print(result.summary["validation_loss_last"], result.folder)

A mistake in a configuration raises CookbookError, whose `problems` are the lines that the command line prints. Nothing
heavy is imported before the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from configs.errors import CookbookError
from configs.schema import Config
from cookbook.functions import compose, estimate, from_hydra, launch, plan, predicted_speed, search, train
from cookbook.result import Result

if TYPE_CHECKING:
    from trainer.report.callbacks import Callback

__all__ = [
    "Callback",
    "Config",
    "CookbookError",
    "Result",
    "compose",
    "estimate",
    "from_hydra",
    "launch",
    "plan",
    "predicted_speed",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "Callback":  # torch comes with it
        from trainer.report.callbacks import Callback

        return Callback
    raise AttributeError(f"module 'cookbook' has no attribute {name!r}")
