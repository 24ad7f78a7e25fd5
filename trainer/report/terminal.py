"""A run's output for people: single lines with a fixed form, or a live bar on a terminal.

    step 12/200  loss 4.1234  grad_norm 1.23  lr 3.00e-04  12,345 tokens/s  332 ms/step  mfu 41.2%  memory 12.34 GiB

Two spaces separate the fields, which keep their order; unknown fields are omitted.
"""

# ruff: noqa: B027  (what a terminal may leave as it is)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from configs import choices
from trainer.report.metrics import (
    CheckpointMetrics,
    Comparison,
    SampleMetrics,
    StepMetrics,
    Summary,
    ValidationMetrics,
    perplexity,
)
from trainer.report.picture import readable_by

Shown = StepMetrics | ValidationMetrics | SampleMetrics | CheckpointMetrics

GIB = 2**30
MIB = 2**20
PROMPT = 60
"""Number of a prompt's last characters that are shown."""


class Terminal(ABC):
    @abstractmethod
    def say(self, text: str) -> None:
        """Lines that stay."""

    def begin(self) -> None:
        """Before the first step."""

    def advance(self, step: int) -> None:
        """A step is done."""

    @abstractmethod
    def show(self, metrics: Shown) -> None: ...

    def close(self) -> None: ...


def shows_pictures(curve: bool | None, console: Console | None = None) -> bool:
    """curve: `logging.curve`. console: as for `open_terminal`."""
    console = console or Console()
    return readable_by(console.encoding) and (console.is_terminal if curve is None else curve)


def open_terminal(progress: choices.ProgressDisplay, steps: int, *, console: Console | None = None) -> Terminal:
    """The terminal for `logging.progress`. console: where to write; standard output by default."""
    console = console or Console()
    if progress is choices.ProgressDisplay.auto:
        progress = choices.ProgressDisplay.bar if console.is_terminal else choices.ProgressDisplay.lines
    if progress is choices.ProgressDisplay.bar:
        return _Bar(console, steps)
    return _Lines(console, steps, quiet=progress is choices.ProgressDisplay.off)


class _Lines(Terminal):
    def __init__(self, console: Console, steps: int, *, quiet: bool) -> None:
        self._file, self._steps, self._quiet = console.file, steps, quiet

    def say(self, text: str) -> None:
        # Flushed: in a batch job's log a line is there when its step is done.
        print(text, file=self._file, flush=True)

    def show(self, metrics: Shown) -> None:
        if not self._quiet:
            self.say(render(metrics, self._steps))


class _Bar(Terminal):
    def __init__(self, console: Console, steps: int) -> None:
        self._steps = steps
        fixed, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1)
        self._progress = Progress(
            MofNCompleteColumn(table_column=fixed),
            BarColumn(bar_width=10, table_column=fixed),
            TimeRemainingColumn(table_column=fixed),
            # On a narrow terminal the numbers are cut at the right, not the count of steps.
            TextColumn("{task.description}", markup=False, table_column=rest),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=steps)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self) -> None:
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, metrics: Shown) -> None:
        if isinstance(metrics, StepMetrics):
            self._progress.update(self._task, description="  ".join(_step_fields(metrics)))
        else:
            self.say(render(metrics, self._steps))

    def close(self) -> None:
        self._progress.stop()


def render(metrics: Shown, steps: int) -> str:
    """One line of metrics. steps: of the whole run."""
    match metrics:
        case StepMetrics():
            fields = _step_fields(metrics)
        case ValidationMetrics():
            fields = _validation_fields(metrics)
        case SampleMetrics():
            fields = _sample_fields(metrics)
        case CheckpointMetrics():
            fields = _checkpoint_fields(metrics)
    return "  ".join([f"step {metrics.step}/{steps}", *fields])


def _step_fields(metrics: StepMetrics) -> Iterator[str]:
    yield f"loss {metrics.loss:.4f}"
    if metrics.grad_norm is not None:
        yield f"grad_norm {metrics.grad_norm:.2f}"
    groups = (metrics.lr_of or {}).items()
    yield f"lr {', '.join(f'{name} {rate:.2e}' for name, rate in groups) or f'{metrics.lr:.2e}'}"
    yield f"{metrics.tokens_per_second:,.0f} tokens/s"
    yield f"{metrics.step_seconds * 1000:.0f} ms/step"
    if metrics.mfu is not None:
        yield f"mfu {metrics.mfu:.1%}"
    if metrics.peak_allocated_bytes is not None:
        yield f"memory {size(metrics.peak_allocated_bytes)}"
    if metrics.loss_scale is not None:
        yield f"loss_scale {metrics.loss_scale:g}"
    if metrics.skipped_steps:
        yield f"skipped_steps {metrics.skipped_steps}"


def _validation_fields(metrics: ValidationMetrics) -> Iterator[str]:
    yield f"validation_loss {metrics.validation_loss:.4f}"
    yield f"validation_perplexity {metrics.validation_perplexity:.2f}"
    yield from (f"{metric} {loss:.4f}" for metric, loss in (metrics.sets or {}).items())


def _sample_fields(metrics: SampleMetrics) -> Iterator[str]:
    """Quoted as in Python: one line without commands to the terminal."""
    cut = "..." if len(metrics.prompt) > PROMPT else ""
    yield f"sample {metrics.number}"
    yield f"prompt {cut}{metrics.prompt[-PROMPT:]!r}"
    yield f"text {metrics.text!r}{'' if metrics.ended else '...'}"


def _checkpoint_fields(metrics: CheckpointMetrics) -> Iterator[str]:
    yield f"checkpoint {size(metrics.checkpoint_bytes)}"
    yield f"saved in {metrics.checkpoint_seconds:.2f} s"
    yield f"checkpoint stall {metrics.checkpoint_blocked_seconds:.2f} s"


def render_summary(summary: Summary) -> str:
    """The last lines of a run, in the form of the plan."""
    skipped = f", {summary.skipped_steps} without an update" if summary.skipped_steps else ""
    lines = [f"finished   {summary.steps} steps{skipped}, {summary.tokens:,} tokens in {summary.seconds:.1f} s"]
    if summary.tokens_of:
        parts = ", ".join(f"{name} {count:,}" for name, count in summary.tokens_of.items())
        lines.append(f"mixture    tokens: {parts}")
    for name, first, last in (
        ("training", summary.loss_first, summary.loss_last),
        ("validation", summary.validation_loss_first, summary.validation_loss_last),
    ):
        if first is not None and last is not None:
            before, after = perplexity(first), perplexity(last)
            lines.append(f"{name:<11}loss {first:.4f} -> {last:.4f}, perplexity {before:.2f} -> {after:.2f}")
    if summary.stopped_early is not None:
        lines.insert(0, f"enough     {summary.stopped_early}")
    if summary.best is not None:
        kept = f", kept as {summary.best['checkpoint']}" if "checkpoint" in summary.best else ""
        lines.append(
            f"best       {summary.best['metric']} {summary.best['value']:.4f} after step {summary.best['step']}{kept}"
        )
    if summary.tokens_per_second is not None:
        utilisation = f", mfu {summary.mfu:.1%}" if summary.mfu is not None else ""
        lines.append(f"speed      {summary.tokens_per_second:,.0f} tokens/s in the median step{utilisation}")
    if summary.peak_allocated_bytes is not None and summary.peak_reserved_bytes is not None:
        lines.append(
            f"memory     peak {size(summary.peak_allocated_bytes)} allocated,"
            f" {size(summary.peak_reserved_bytes)} reserved on the fullest GPU"
        )
    elif summary.peak_host_bytes is not None:
        lines.append(f"memory     peak {size(summary.peak_host_bytes)} in the largest process{_of(summary)}")
    lines += _predicted(summary.memory, gpu=summary.peak_allocated_bytes is not None)
    if summary.model_dir is not None:
        lines.append(f"model      {summary.model_dir}")
    return "\n".join([*lines, f"report     {summary.run_dir}/report.html", f"run        {summary.run_dir}"])


def _of(summary: Summary) -> str:
    """Memory of a CPU run's process. The prediction covers the tensors, which are a part of it; libraries allocate
    further buffers when they are first used."""
    memory, resident = summary.memory, summary.peak_host_bytes or 0
    tensors, libraries = memory.measured_allocated_bytes or memory.predicted_allocated_bytes, memory.libraries_bytes
    if tensors is None or libraries is None:
        return " (resident set)"
    how = f"predicted; {memory.memory_note}" if memory.measured_allocated_bytes is None else "measured"
    rest = resident - libraries - tensors
    others = f", {size(rest)} buffers of libraries and allocator" if rest >= MIB else ""
    return f" = {size(libraries)} Python and its libraries, {size(tensors)} tensors ({how}){others}"


def _predicted(memory: Comparison, *, gpu: bool) -> Iterator[str]:
    """The prediction next to the measurement."""
    allocated, measured = memory.predicted_allocated_bytes, memory.measured_allocated_bytes
    if allocated is None:
        if memory.memory_note is not None:
            yield f"predicted  {memory.memory_note}"
        return
    if not gpu and measured is None and memory.libraries_bytes is not None:
        return  # `_of` has reported it
    reserved = memory.predicted_reserved_bytes if gpu else None
    text = f"predicted  {_peak(allocated, reserved, memory.predicted_reserved_most_bytes)}"
    if gpu and memory.predicted_verdict is not None:
        text += f" ({memory.predicted_verdict})"
    if measured is None or memory.memory_ratio is None:
        yield f"{text}; {memory.memory_note}"
    else:
        yield (
            f"{text}; measured {_peak(measured, memory.measured_reserved_bytes)} on rank {memory.memory_rank}, the"
            f" furthest off: ratio {memory.memory_ratio:.3f}"
        )


def _peak(allocated: int, reserved: int | None, most: int | None = None) -> str:
    """most: the upper end of the reserved memory, for a prediction."""
    if reserved is None:
        return f"{size(allocated)} of tensors"
    until = f" to {size(most)}" if most is not None and most != reserved else ""
    return f"{size(allocated)} allocated, {size(reserved)}{until} reserved"


def size(value: int) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / MIB:.0f} MiB"
