"""The reporter: passes everything that the loop reports to the terminal, metrics.jsonl and the tracker.

    with Reporter(config, plan, runtime, folder, model=..., data=...) as reporter:
        reporter.validation(0, loss), reporter.samples(texts)
        for each step: reporter.step(step, result, lr, seconds)
                            reporter.checkpoint(saved)
        reporter.exported(path)

Entering shows data, model and folder and opens the outputs; leaving writes the summary, unless the run failed. Every
rank makes the same calls: the slowest rank's times and the fullest rank's memory are reported, which takes one small
all-reduce on the steps that log. Only rank 0 writes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from configs import waiting
from configs.by_path import described
from configs.errors import CookbookError, OutputFailed
from configs.schema import Config
from trainer.flops import count_parameters, mfu, model_flops, peak_flops
from trainer.model.build import architecture
from trainer.plan.plan import Plan
from trainer.process.disks import writing, written
from trainer.process.files import replace_text
from trainer.process.runtime import Runtime
from trainer.report.callbacks import Callbacks, Run
from trainer.report.folder import run_label
from trainer.report.measure import PeakMemory, StepSeconds, peak_memory
from trainer.report.metrics import (
    CheckpointMetrics,
    Comparison,
    Line,
    MetricsFile,
    SampleMetrics,
    StepMetrics,
    Summary,
    Totals,
    ValidationMetrics,
    numbers,
    perplexity,
    to_dict,
)
from trainer.report.page import PREDICTION
from trainer.report.picture import loss_picture
from trainer.report.prediction import MemoryCheck
from trainer.report.reading import read_run
from trainer.report.terminal import Terminal, open_terminal, render_summary, shows_pictures
from trainer.report.trackers import Tracker, start_tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trainer.checkpoint.manager import SavedCheckpoint
    from trainer.engine import StepResult

UNKNOWN = -1  # a number that a rank does not know, in a maximum over ranks


class Reporter:
    """folder: from `open_run_folder`. model: as the engine holds it. data: the data set in one line. samples_of: from
    the data set. resumed: the `progress` of an earlier start that this one continues. memory: None if nothing is
    predicted.
    ask: ends the run after this step, for a reason."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        runtime: Runtime,
        folder: Path,
        *,
        model: PreTrainedModel,
        data: str,
        samples_of: Callable[[range], Mapping[str, int]] = lambda _: {},
        resumed: Mapping[str, Any] | None = None,
        memory: MemoryCheck | None = None,
        callbacks: Callbacks | None = None,
        ask: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._config, self._plan, self._runtime, self._folder, self._memory = config, plan, runtime, folder, memory
        self._samples_of, self._callbacks = samples_of, callbacks
        self._run = Run(config=config, plan=plan, rank=runtime.rank, folder=folder, model=model, ask=ask)
        parameters, active = count_parameters(model), count_parameters(model, active=True)
        met = f" ({active:,} active for a token)" if active < parameters else ""
        flops = model_flops(model, seq_len=plan.batch.seq_len)
        self._flops_per_token = flops.step(config)
        gpu = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else None
        self._peak_flops = peak_flops(config, plan, gpu, flops)
        self._head = [
            f"data       {data}",
            f"model      {architecture(model)}, {parameters:,} parameters{met}, {config.model.weights} weights",
            f"run        {folder}",
        ]
        if memory is not None and runtime.is_main:
            self._head.append(memory.describe())
        if gpu is not None:
            peak, narrow = self._peak_flops, " and float8" if flops.float8 else ""
            known = f"peak {peak / 1e12:,.0f} TFLOP/s" if peak else "peak not known, hence no mfu"
            self._head.insert(0, f"device     {gpu}; {known} in {plan.param_dtype}{narrow}")
        self._terminal: Terminal | None = None
        self._file: MetricsFile | None = None
        self._tracker: Tracker | None = None
        self._started = self._ended = time.perf_counter()
        self._step_seconds: list[float] = []
        self._unlogged: list[StepSeconds] = []
        self._seconds_before = float((resumed or {}).get("seconds", 0.0))
        self.totals = Totals(**{key: value for key, value in (resumed or {}).items() if key != "seconds"})
        self._stopped: str | None = None
        self._exported: Path | None = None
        self._best: Mapping[str, object] | None = None
        self._early: str | None = None

    def __enter__(self) -> Reporter:
        """A collective. Raises EnvironmentProblem on every rank if an output cannot be opened."""
        try:
            self._runtime.agree(self._open if self._runtime.is_main else lambda: None)
        except CookbookError:
            self.close(failed=True)
            raise
        self._started = self._ended = time.perf_counter() - self._seconds_before
        if self._callbacks:
            self._callbacks.begin(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A collective if the run has finished; not if it failed, perhaps on one rank only."""
        try:
            if error is None and self._stopped is None:
                self._finish()
        finally:
            self.close(failed=error is not None)

    def step(self, step: int, result: StepResult, lr: float, seconds: StepSeconds) -> None:
        """A step is done. step: from 1. seconds: this rank's. A collective on the steps that log."""
        report = result.report
        updated = report is not None and report.updated
        self._step_seconds.append(seconds.step)
        self._unlogged.append(seconds)
        before, batch = self.totals.tokens // self._plan.batch.seq_len, self._plan.batch
        of_sources = self._samples_of(range(before, before + batch.global_batch_size))
        self.totals.add_step(
            loss=result.loss,
            tokens=self._plan.batch.tokens,
            valid_tokens=result.valid_tokens,
            updated=updated,
            tokens_of={name: samples * batch.seq_len for name, samples in of_sources.items()},
        )
        self._ended = time.perf_counter()
        if self._memory:
            self._memory.step_done(updated=updated)
        if self._terminal:
            self._terminal.advance(step)
        if step != 1 and step != self._plan.steps and step % self._config.logging.every:
            return
        slowest, memory = self._over_ranks()
        self._unlogged.clear()
        speed = self._plan.batch.tokens / slowest.step
        self._write(
            StepMetrics(
                step=step,
                loss=result.loss,
                grad_norm=report.grad_norm if report else None,
                lr=lr,
                lr_of=dict(report.learning_rates) or None if report else None,
                moe=dict(report.experts) or None if report else None,
                tokens_per_second=speed,
                step_seconds=slowest.step,
                data_seconds=slowest.data,
                forward_backward_seconds=slowest.forward_backward,
                optimizer_seconds=slowest.optimizer,
                mfu=self._mfu(speed),
                peak_allocated_bytes=memory.allocated_bytes,
                peak_reserved_bytes=memory.reserved_bytes,
                peak_host_bytes=memory.host_bytes,
                loss_scale=report.loss_scale if report else None,
                skipped_steps=self.totals.skipped_steps,
                tokens=self.totals.tokens,
                valid_tokens=self.totals.valid_tokens,
                tokens_of=self.totals.tokens_of,
            )
        )

    def validation(self, step: int, loss: float, sets: Mapping[str, float] | None = None) -> None:
        """step: number of updates before this validation; 0 for the untrained model. loss: the same on all ranks. sets:
        losses of the named sets, by metric."""
        self.totals.add_validation(loss)
        self._ended = time.perf_counter()
        self._write(
            ValidationMetrics(
                step=step,
                validation_loss=loss,
                validation_perplexity=perplexity(loss),
                sets=sets or None,
                tokens=self.totals.tokens,
            )
        )

    def samples(self, lines: Sequence[SampleMetrics]) -> None:
        """The texts of one validation. A collective."""
        self._ended = time.perf_counter()
        for line in lines:
            self._write(line)
        if lines:
            self._track_with(lambda tracker: _show(tracker, lines))

    def progress(self) -> dict[str, Any]:
        """State with which a later start of this run continues the same sums."""
        return {**asdict(self.totals), "seconds": self._ended - self._started}

    def checkpoint(self, saved: SavedCheckpoint) -> None:
        """A checkpoint is committed."""
        self._write(
            CheckpointMetrics(
                step=saved.step,
                checkpoint_bytes=saved.bytes,
                checkpoint_blocked_seconds=saved.blocked_seconds,
                checkpoint_seconds=saved.seconds,
            )
        )

    def chosen(self, best: Mapping[str, object] | None, early: str | None) -> None:
        """best: the best validation. early: why the run ends before its last step. The summary says both."""
        self._best, self._early = best, early

    def stopped(self, reason: str) -> None:
        """The run ends before its last step because it was asked to: no summary."""
        self._stopped = reason
        if self._terminal:
            self._terminal.say(f"stopped    after step {self.totals.steps} ({reason}); the same command goes on")

    def exported(self, folder: Path) -> None:
        """The finished model is in `folder`; the summary will say so."""
        self._exported = folder

    def close(self, *, failed: bool) -> None:
        """Release the terminal and close the outputs; a second call does nothing. No collective."""
        terminal, tracker, file = self._terminal, self._tracker, self._file
        self._terminal = self._tracker = self._file = None
        for output in (terminal, file):
            if output:
                output.close()
        if tracker:
            try:
                tracker.finish(failed=failed)
            except Exception as error:
                self._give_up_tracker(error, terminal)

    def _open(self) -> None:
        waiting.clear()
        self._terminal = open_terminal(self._config.logging.progress, self._plan.steps)
        for line in self._head:
            self._terminal.say(line)
        with writing(self._folder):
            if self._memory:
                replace_text(self._folder / PREDICTION, json.dumps(self._memory.record()) + "\n")
            self._file = MetricsFile(self._folder / "metrics.jsonl", after_step=self.totals.steps)
        name = f"{run_label(self._config)}-{self._folder.name}"
        self._tracker = start_tracker(
            self._config, self._plan, self._folder, run_name=name, after_step=self.totals.steps
        )
        self._terminal.begin()

    def _finish(self) -> None:
        """Write and show the summary. A collective."""
        _, memory = self._over_ranks()
        # The first step allocates, compiles and fills caches.
        typical = self._step_seconds[1:] or self._step_seconds
        speed = self._plan.batch.tokens / statistics.median(typical) if typical else None
        summary = Summary(
            **asdict(self.totals),
            best=self._best,
            stopped_early=self._early,
            seconds=self._ended - self._started,
            tokens_per_second=speed,
            mfu=self._mfu(speed) if speed is not None else None,
            peak_allocated_bytes=memory.allocated_bytes,
            peak_reserved_bytes=memory.reserved_bytes,
            peak_host_bytes=memory.host_bytes,
            memory=self._memory.compare() if self._memory else Comparison(),
            run_dir=str(self._folder),
            model_dir=str(self._exported) if self._exported else None,
        )
        self._write(summary)
        self._track(numbers(summary.memory), self.totals.steps)
        terminal = self._terminal
        self.close(failed=False)
        text = json.dumps(to_dict(summary), indent=2, allow_nan=False) + "\n"
        self._as_main("summary.json", lambda: replace_text(self._folder / "summary.json", text))
        if terminal:
            if shows_pictures(self._config.logging.curve):
                run = read_run(self._folder.name, self._folder)  # with the steps of earlier starts
                if drawn := loss_picture(run.losses, run.validations):
                    terminal.say(drawn)
            terminal.say(render_summary(summary))

    def _as_main(self, name: str, write: Callable[[], None]) -> None:
        """Do this on rank 0. A collective. Raises OutputFailed on every rank if that rank's disk fails."""
        failure: OutputFailed | None = None
        if self._runtime.is_main:
            try:
                with written(name, self._folder):
                    write()
            except OutputFailed as refusal:
                failure = refusal

        def tell() -> None:
            if failure is not None:
                raise failure

        # One number for every line; texts only if there is something to report.
        if self._runtime.max(failure is not None)[0]:
            self._runtime.agree(tell)

    def _write(self, line: Line) -> None:
        """A collective."""
        file = self._file
        self._as_main("metrics.jsonl", lambda: file.write(line) if file else None)
        if self._terminal and not isinstance(line, Summary):
            self._terminal.show(line)
        if not isinstance(line, Summary):
            self._track(numbers(line), line.step)
        if self._callbacks:
            self._callbacks.tell(line)

    def _track(self, values: Mapping[str, int | float], step: int) -> None:
        if values:
            self._track_with(lambda tracker: tracker.log(values, step))

    def _track_with(self, tell: Callable[[Tracker], None]) -> None:
        if self._tracker:
            try:
                tell(self._tracker)
            except Exception as error:
                self._tracker = None
                self._give_up_tracker(error, self._terminal)

    def _give_up_tracker(self, error: Exception, terminal: Terminal | None) -> None:
        """A server that goes away must not end a training run: metrics.jsonl has everything."""
        if terminal:
            terminal.say(
                f"logging.tracker={self._config.logging.tracker}: failed ({described(error)}) and is not used from here"
                f" on; {self._folder / 'metrics.jsonl'} goes on"
            )

    def _over_ranks(self) -> tuple[StepSeconds, PeakMemory]:
        """Mean times per step since the last line and peak memory, each the largest over ranks. A collective."""
        steps = self._unlogged or [StepSeconds(step=0.0, data=0.0, forward_backward=0.0, optimizer=0.0)]
        times = [statistics.fmean(parts) for parts in zip(*map(astuple, steps), strict=True)]
        memory = [UNKNOWN if size is None else size for size in astuple(peak_memory(self._runtime.device))]
        largest = self._runtime.max(*times, *memory)
        sizes = [None if size == UNKNOWN else int(size) for size in largest[len(times) :]]
        return StepSeconds(*largest[: len(times)]), PeakMemory(*sizes)

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak_flops is None:
            return None
        return mfu(
            tokens_per_second,
            flops_per_token=self._flops_per_token,
            world_size=self._plan.world_size,
            peak_flops=self._peak_flops,
        )


def _show(tracker: Tracker, lines: Sequence[SampleMetrics]) -> None:
    """Texts, which a user's own tracker need not support."""
    if callable(texts := getattr(tracker, "texts", None)):
        texts(lines, lines[0].step)
