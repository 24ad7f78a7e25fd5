"""metrics.jsonl, key by key: one JSON object per line, each with a `kind`.

    step          every `logging.every` steps, and the first and the last
    validation    after each validation
    sample        after a validation: each text of `train.samples`
    checkpoint    after each commit of a checkpoint
    summary       one, at the end; also saved as summary.json

Every line of a kind has all of its keys. null: unknown here, or not a finite number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from trainer.process.files import replace_text


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """A training line. Loss, gradient norm and learning rate belong to this step; times are means per step since the
    previous line, of the slowest rank."""

    kind: ClassVar[str] = "step"

    step: int
    """Optimizer updates so far, this one included."""
    loss: float
    """Mean cross-entropy over the step's valid tokens (smoothed with `train.label_smoothing`), and the terms of `moe`,
    before the update."""
    grad_norm: float | None
    """Global L2 norm before clipping; null if the loss was not finite and there was no gradient."""
    lr: float
    """The schedule's value. A group of parameters may have its own multiple of it."""
    lr_of: Mapping[str, float] | None
    """The learning rate of each group by its name; null where all have `lr`."""
    moe: Mapping[str, float] | None
    """Routed experts in this step. load: tokens of a layer's busiest expert over the mean, averaged over the layers;
    load_worst_layer: the same of the worst layer; balance, z: terms of the loss, without their coefficients. null: a
    dense model, or compiled layers."""
    tokens_per_second: float
    """Over all ranks, ignored labels included: the hardware's throughput."""
    step_seconds: float
    data_seconds: float
    """Waiting for the next batch."""
    forward_backward_seconds: float
    optimizer_seconds: float
    """Clipping and update."""
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1. null: on the CPU, or a GPU whose peak is not known."""
    peak_allocated_bytes: int | None
    """torch.cuda.max_memory_allocated since the start, largest over ranks; null on the CPU."""
    peak_reserved_bytes: int | None
    """torch.cuda.max_memory_reserved, likewise: with the allocator's own waste."""
    peak_host_bytes: int | None
    """Peak resident set of a process, Python and libraries included, largest over ranks."""
    loss_scale: float | None
    """float16 only: the scale of this step's loss."""
    skipped_steps: int
    """Number of steps so far whose update was skipped."""
    tokens: int
    """So far, all ranks, ignored labels included."""
    valid_tokens: int
    """So far, all ranks: those that took part in the loss."""
    tokens_of: Mapping[str, int] | None
    """`tokens` of each source of `data.mixture`, by its name; null without a mixture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationMetrics:
    kind: ClassVar[str] = "validation"

    step: int
    """Optimizer updates before it; 0 is the untrained model."""
    validation_loss: float
    """Mean cross-entropy over the valid tokens of the validation samples."""
    validation_perplexity: float
    """exp(validation_loss)"""
    sets: Mapping[str, float] | None = None
    """validation_loss/NAME of each of `data.validation_sets`; null: there are none."""
    tokens: int
    """Trained on so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleMetrics:
    kind: ClassVar[str] = "sample"

    step: int
    """Step of its validation."""
    number: int
    """From 1: those of `train.samples.prompts` in their order, then those taken from the validation data."""
    prompt: str
    """The whole text before it: with data=chat as the template writes it."""
    text: str
    """What the model wrote."""
    ended: bool
    """Whether it ended the text itself; false: it was cut off after `train.samples.tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMetrics:
    kind: ClassVar[str] = "checkpoint"

    step: int
    """Optimizer updates in it."""
    checkpoint_bytes: int
    checkpoint_blocked_seconds: float
    """Checkpoint stall of the training: the whole save, or with `checkpoint.async_save` the copy to host memory and the
    commit."""
    checkpoint_seconds: float
    """From its begin to its commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The memory estimate against the first two steps of the last start, for the rank with the largest difference."""

    predicted_allocated_bytes: int | None = None
    """Peak, as `memory-estimate` predicts it (of the busiest kind of rank where nothing was measured); null: not
    estimated."""
    predicted_reserved_bytes: int | None = None
    """The lower end of the range; predicted_reserved_most_bytes is the upper one."""
    predicted_reserved_most_bytes: int | None = None
    predicted_verdict: str | None = None
    """The prediction's verdict for the GPU, over all ranks: `fits`, `tight` or `does not fit`."""
    measured_allocated_bytes: int | None = None
    """torch.cuda.max_memory_allocated; on the CPU the tensors that `estimate.measure` counts; null: not measured."""
    measured_reserved_bytes: int | None = None
    """torch.cuda.max_memory_reserved; null on the CPU."""
    memory_ratio: float | None = None
    """measured_allocated_bytes / predicted_allocated_bytes: above 1 the prediction was too low."""
    memory_rank: int | None = None
    """The rank whose ratio is furthest from 1: these numbers are its own."""
    predicted_bytes_by_rank: list[int] | None = None
    """predicted_allocated_bytes of every rank; null: not estimated."""
    measured_bytes_by_rank: list[int] | None = None
    """measured_allocated_bytes of every rank; null: not measured on all of them."""
    libraries_bytes: int | None = None
    """Resident set of rank 0 before it built the model: Python and its libraries; null: the system does not tell."""
    memory_note: str | None = None
    """Why numbers are missing: the reason for no estimate, or for no measurement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The result of the run."""

    kind: ClassVar[str] = "summary"

    steps: int
    tokens: int
    valid_tokens: int
    tokens_of: Mapping[str, int] | None = None
    """`tokens` of each source of a mixture."""
    skipped_steps: int
    seconds: float
    """From the start of the first step or validation to the end of the last."""
    loss_first: float | None
    """Training loss of the first step: of the model as it was at the start."""
    loss_last: float | None
    """Training loss of the last step."""
    validation_loss_first: float | None
    validation_loss_last: float | None
    best: Mapping[str, object] | None = None
    """The best validation after a step, where `checkpoint.best` or `train.patience` asks for one: metric, value, step
    and, where it is kept, its checkpoint."""
    stopped_early: str | None = None
    """Why the run ended before `train.steps`; null: it did not."""
    tokens_per_second: float | None
    """From the median step, the first one (which allocates and compiles) left out."""
    mfu: float | None
    """At that speed."""
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    peak_host_bytes: int | None
    memory: Comparison = field(default_factory=Comparison)
    run_dir: str
    model_dir: str | None
    """The finished model as a Hugging Face folder; null where none was exported."""


@dataclass(kw_only=True, slots=True)
class Totals:
    """What adds up over the steps of a run; fields as in `Summary`."""

    steps: int = 0
    tokens: int = 0
    valid_tokens: int = 0
    tokens_of: Mapping[str, int] | None = None
    skipped_steps: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    validation_loss_first: float | None = None
    validation_loss_last: float | None = None

    def add_step(
        self, *, loss: float, tokens: int, valid_tokens: int, updated: bool, tokens_of: Mapping[str, int] | None = None
    ) -> None:
        self.steps += 1
        self.tokens += tokens
        self.valid_tokens += valid_tokens
        if tokens_of:
            before = self.tokens_of or {}
            self.tokens_of = {name: before.get(name, 0) + count for name, count in tokens_of.items()}
        self.skipped_steps += not updated
        self.loss_first = loss if self.loss_first is None else self.loss_first
        self.loss_last = loss

    def add_validation(self, loss: float) -> None:
        self.validation_loss_first = loss if self.validation_loss_first is None else self.validation_loss_first
        self.validation_loss_last = loss


Line = StepMetrics | ValidationMetrics | SampleMetrics | CheckpointMetrics | Summary
LOGGED = (StepMetrics.kind, ValidationMetrics.kind, SampleMetrics.kind, CheckpointMetrics.kind)


def to_dict(line: Line) -> dict[str, object]:
    """The line in JSON's terms: JSON has no NaN and no infinity."""
    return {"kind": line.kind, **{key: _finite(value) for key, value in asdict(line).items()}}


def numbers(line: Line | Comparison) -> Mapping[str, int | float]:
    """What a tracker plots: the numbers of the line that are known, without the step, which is its own axis."""
    if isinstance(line, SampleMetrics):
        return {}
    values = asdict(line)
    groups = {f"lr/{name}": rate for name, rate in (values.get("lr_of") or {}).items()}
    groups |= {f"tokens/{name}": count for name, count in (values.get("tokens_of") or {}).items()}
    groups |= {f"moe/{name}": value for name, value in (values.get("moe") or {}).items()}
    groups |= values.get("sets") or {}
    known = {key: value for key, value in values.items() if isinstance(value, int | float) and key != "step"}
    return {**known, **groups}


def perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """Appends whole lines, each in one write: a reader, or a killed run, never sees half a line."""

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        """after_step: where the run continues. Lines of later steps, from a start that ended before it could save them,
        are removed, because these steps are repeated."""
        replace_text(path, "".join(_lines_upto(path, after_step)))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  stays open until `close`

    def write(self, line: Line) -> None:
        self._file.write(json.dumps(to_dict(line), allow_nan=False) + "\n")

    def close(self) -> None:
        with suppress(OSError):  # the rest of a line that did not fit on a full disk, reported when it was written
            self._file.close()


def _lines_upto(path: Path, step: int) -> Iterator[str]:
    """Lines of steps up to this one. Damaged lines, after a power failure, are dropped."""
    if step == 0 or not path.exists():
        return
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
            keep = content["kind"] in LOGGED and content["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            keep = False
        if keep and line.endswith("\n"):
            yield line
