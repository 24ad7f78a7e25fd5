"""A user's own code that a run calls: `train.callbacks=[package.module.Class]`, or objects for `cookbook.train`.

    class Stop(Callback):
        def on_validation(self, line):
            if line.validation_loss < 2.0:
                self.run.stop("good enough")

Each rank has its own callbacks. They get the lines of metrics.jsonl as `trainer.report.metrics` defines them, after
they are written. An exception in a callback ends the run, like any failure of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from configs.by_path import described, find
from configs.errors import PlanError
from configs.schema import Config
from trainer.plan.plan import Plan
from trainer.report.metrics import CheckpointMetrics, Line, SampleMetrics, StepMetrics, Summary, ValidationMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "train.callbacks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A callback's view of its run. model: as the engine holds it; its parameters may be shards."""

    config: Config
    plan: Plan
    rank: int
    folder: Path
    model: PreTrainedModel
    ask: Callable[[str], None]

    def stop(self, reason: str) -> None:
        """End the run after this step, with a checkpoint and exit code 75. On any rank. It has no effect after the last
        step."""
        self.ask(reason)


class Callback:
    """Methods to override. `run` is set before the first call."""

    run: Run

    def on_begin(self) -> None:
        """The model is built and restored; no step of this start is done."""

    def on_step(self, line: StepMetrics) -> None:
        """Every `logging.every` steps, after the first and after the last."""

    def on_validation(self, line: ValidationMetrics) -> None: ...

    def on_sample(self, line: SampleMetrics) -> None:
        """After a validation, each text of `train.samples`."""

    def on_checkpoint(self, line: CheckpointMetrics) -> None:
        """A checkpoint is committed."""

    def on_end(self, line: Summary) -> None:
        """The run has finished. A stopped run does not call it."""


class Callbacks:
    """The callbacks of one rank: given objects, then those that the configuration names."""

    def __init__(self, config: Config, given: Sequence[Callback] = ()) -> None:
        """Raises PlanError, all problems at once, for a path or an object that is not a Callback."""
        if problems := _strangers(given):
            raise PlanError(*problems)
        self._all = [*given, *_named(config.train.callbacks)]

    def begin(self, run: Run) -> None:
        for callback in self._all:
            callback.run = run
            callback.on_begin()

    def tell(self, line: Line) -> None:
        for callback in self._all:
            match line:
                case StepMetrics():
                    callback.on_step(line)
                case ValidationMetrics():
                    callback.on_validation(line)
                case SampleMetrics():
                    callback.on_sample(line)
                case CheckpointMetrics():
                    callback.on_checkpoint(line)
                case Summary():
                    callback.on_end(line)


def _strangers(given: object) -> list[str]:
    """One line for each of the caller's objects that is not a callback."""
    if not isinstance(given, Sequence):
        return [f"callbacks={type(given).__name__}: must be a list: train(config, [callback])"]
    return [
        f"callbacks: {each!r} is no object of a class derived from Callback; give [MyCallback()]"
        for each in cast(Sequence[object], given)
        if not isinstance(each, Callback)
    ]


def _named(paths: Sequence[str]) -> list[Callback]:
    made: list[Callback] = []
    problems: list[str] = []
    for path in paths:
        given = f"{KEY}=[{path}]"
        try:
            found = find(path, given)
        except PlanError as error:
            problems += error.problems
            continue
        if not (isinstance(found, type) and issubclass(found, Callback)):
            problems.append(f"{given}: is no subclass of trainer.report.callbacks.Callback; derive it from that")
            continue
        try:
            made.append(found())
        except Exception as error:  # whatever its constructor raises
            problems.append(f"{given}: cannot be made without arguments ({described(error)})")
    if problems:
        raise PlanError(*problems)
    return made
