"""The best validation so far, and the criterion to stop: `checkpoint.best` and `train.patience`.

    step     validation loss     best     waited (patience 2)
    100      3.1                 3.1      0
    200      2.9                 2.9      0
    300      3.0                 2.9      1
    400      2.95                2.9      2: the run ends; step 200 is kept, and exported

Every rank compares the same numbers, and so stops at the same time. Each checkpoint holds the history. The validation
before the first step does not count: no checkpoint holds its weights.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from configs.schema import Config
from trainer.checkpoint.catalog import step_name

METRIC = "validation_loss"
"""Of the validation set without a name."""


def metric_of(name: str) -> str:
    """Of one of `data.validation_sets`."""
    return f"{METRIC}/{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    metric: str
    value: float
    step: int


def problems(config: Config) -> Iterator[str]:
    train = config.train
    asked = {"checkpoint.best=true": config.checkpoint.best, f"train.patience={train.patience}": train.patience > 0}
    for key in (key for key, given in asked.items() if given):
        if not train.eval_every or not train.eval_samples:
            missing = "train.eval_every" if not train.eval_every else "train.eval_samples"
            yield f"{key}: compares one validation with another; set {missing} above 0, or leave it out"
    known = [METRIC, *map(metric_of, config.data.validation_sets)]
    if train.eval_metric not in known:
        yield f"train.eval_metric={train.eval_metric}: must be one of {', '.join(known)}"
    elif train.eval_metric != METRIC and not any(asked.values()):
        yield f"train.eval_metric={train.eval_metric}: is for train.patience and checkpoint.best; leave it out"
    if train.min_delta and not train.patience:
        yield f"train.min_delta={train.min_delta}: is for train.patience, which is 0; set that, or leave it out"


class Selection:
    """best: the smallest value so far, and its step. waited: validations since the last one that was better."""

    def __init__(self, config: Config) -> None:
        self._keeps, self._patience, self._least = config.checkpoint.best, config.train.patience, config.train.min_delta
        self._metric = config.train.eval_metric
        self.best: Best | None = None
        self.waited = 0
        self._reference: float | None = None
        self._kept: Best | None = None

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """A validation after this number of updates. A value that is not a number is never better."""
        if not self._keeps and not self._patience:
            return
        value = metrics[self._metric]
        if value < (self.best.value if self.best is not None else inf):
            self.best = Best(metric=self._metric, value=value, step=step)
        if value < (self._reference - self._least if self._reference is not None else inf):
            self._reference, self.waited = value, 0
        else:
            self.waited += 1

    def due(self, step: int) -> bool:
        """The weights after this step are to be saved."""
        return self._keeps and self.best is not None and self.best.step == step

    @property
    def kept(self) -> int | None:
        """The step whose checkpoint exists and is kept."""
        return self._kept.step if self._kept is not None else None

    @property
    def ended(self) -> str | None:
        """Why the run should end; None while it should not."""
        if not self._patience or self.waited < self._patience:
            return None
        better = f"{self._reference:.6g}" if self._reference is not None else "infinity"
        return f"{self.waited} validations in a row were no better than {better} (train.patience={self._patience})"

    def summary(self, checkpoints: Path) -> dict[str, Any]:
        """For the run's status: the best validation, its checkpoint, and why it ended early."""
        said: dict[str, Any] = {}
        if self.best is not None:
            said["best"] = asdict(self.best)
            if self.kept is not None:
                said["best"]["checkpoint"] = str(checkpoints / step_name(self.kept))
        if self.ended is not None:
            said["waited"] = self.waited
        return said

    def saved(self, state: Mapping[str, Any]) -> None:
        """A checkpoint with this state exists."""
        if self._keeps and (best := state["best"]) is not None:
            self._kept = Best(**best)

    def lost(self, step: int) -> None:
        """The checkpoint of this step could not be written: the existing one remains the best."""
        if self._keeps and self.best is not None and self.best.step <= step:
            self.best = self._kept

    def state(self) -> dict[str, Any]:
        best = asdict(self.best) if self.best is not None else None
        return {"best": best, "reference": self._reference, "waited": self.waited}

    def restore(self, state: Mapping[str, Any], steps: Container[int]) -> None:
        """steps: steps with checkpoints."""
        best = state.get("best")
        if best is not None and best["metric"] != self._metric:
            return  # another metric: its history does not apply to this one
        if best is not None and (not self._keeps or best["step"] in steps):
            self.best = Best(**best)
            self._kept = self.best if self._keeps else None
        self._reference, self.waited = state.get("reference"), int(state.get("waited", 0))
