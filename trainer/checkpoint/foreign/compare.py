"""Settings of a foreign checkpoint that the configuration of the resuming run contradicts.

A difference that makes another model, another optimizer or another position in the data is refused
(`progress.check_same`, and the engine's own check of shapes). The settings here may be changed on purpose: one line
each.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import Any

from configs.schema import Config
from trainer.checkpoint.progress import Progress
from trainer.optim.build import lr_at

_SAME = 1e-6  # relative: numbers that went through float32 are the same


def contradictions(progress: Progress, config: Config, *, source: Path, global_batch_size: int) -> Iterator[str]:
    """One line for each. Nothing for a checkpoint of this trainer's own."""
    origin = progress.origin
    for key, there in origin.get("settings", {}).items():
        here = global_batch_size if key == "train.global_batch_size" else _value(config, key)
        if not _equal(there, here):
            yield f"{source}: was trained with {key}={_short(there)}, this run goes on with {_short(here)}"
    there = origin.get("next_lr")
    if there is not None and progress.step < config.train.steps:
        here = lr_at(config, progress.step)
        if not _equal(there, here):
            yield (
                f"{source}: its next update, step {progress.step + 1}, has a learning rate of {_short(there)}, this run"
                f" makes it with {_short(here)} (scheduler={config.scheduler.name}, train.steps={config.train.steps})"
            )


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _equal(there: Any, here: Any) -> bool:
    if isinstance(there, int | float) and isinstance(here, int | float):
        return isclose(there, here, rel_tol=_SAME)
    return there == here


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
