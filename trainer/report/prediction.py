"""Predicted against measured: every run compares the memory estimate with the memory of its first two updates.

    predicted = predict(config, plan)                       on rank 0, before it joins the process group
    with MemoryCheck(config, plan, runtime, predicted) as memory:
        build the engine; for each step: memory.step_done(updated=...)
        memory.compare()                                    the rank that is furthest from its prediction

Two updates are needed, because optimizer states appear at the end of the first; a step with a skipped update, as in
float16 until the loss scale has come down, creates none. On GPUs torch's allocator has the peak. A CPU process has no
such counter, and its resident set includes Python and the libraries: nothing is measured there unless
`estimate.measure=true` counts every tensor, with the estimator's own tracker.

The estimate never ends a run: an error in it becomes the note that replaces the numbers.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from configs.schema import Config
from trainer.estimate.compose import STEPS
from trainer.estimate.estimate import Estimate, RankEstimate, estimate
from trainer.estimate.tracing import why_not
from trainer.estimate.tracker import Alive, Event, StorageTracker
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime, local_rank
from trainer.report.measure import peak_memory
from trainer.report.metrics import Comparison
from trainer.report.terminal import size

NOT_COUNTED = "estimate.measure=true counts the tensors of a CPU process"
TOO_SHORT = f"fewer than {STEPS} steps with an update do not reach the predicted peak"


Measured = tuple[int, int | None]
"""Allocated and reserved bytes at the peak of a rank; a CPU reserves nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """estimate: None if there is none; note: then the reason. Both None on ranks that were not asked."""

    estimate: Estimate | None = None
    note: str | None = None


def predict(config: Config, plan: Plan) -> Prediction:
    """The estimate, on rank 0 only. Call it before the rank joins its process group: a layout that divides matrices is
    traced on its own group."""
    if os.environ.get("RANK", "0") != "0":
        return Prediction()
    try:
        found = torch.cuda.get_device_name(local_rank()) if plan.device == "cuda" else None
        # A run draws the same random numbers whether its estimate was traced just now or read from disk.
        with torch.random.fork_rng(devices=[]):
            return Prediction(estimate=estimate(config, plan, found_gpu=found))
    except Exception as error:
        # A defect of the estimator must not end an otherwise correct run.
        return Prediction(note=f"not estimated: {why_not(error)}")


class MemoryCheck:
    """Every rank makes one before it builds its engine."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime, predicted: Prediction) -> None:
        self._config, self._plan, self._runtime = config, plan, runtime
        self._estimate, self._note = predicted.estimate, predicted.note
        self._peak: _Peak | None = None
        self._counting = ExitStack()
        self._updates = 0
        self._measured: Measured | None = None
        self._libraries = peak_memory(runtime.device).host_bytes

    def __enter__(self) -> MemoryCheck:
        if self._config.estimate.measure:
            self._peak = _Peak()
            self._counting.enter_context(StorageTracker(on_event=self._peak))
        return self

    def __exit__(self, *_: object) -> None:
        self._counting.close()

    def describe(self) -> str:
        """The prediction in one line, or why there is none."""
        if self._estimate is None:
            return f"memory     {self._note}"
        rank = self._estimate.busiest
        if self._plan.device == "cpu":
            return f"memory     {size(rank.peak_allocated_bytes)} of tensors per process predicted"
        return (
            f"memory     {size(rank.peak_allocated_bytes)} allocated, {size(rank.peak_reserved_bytes)} to"
            f" {size(rank.peak_reserved_most_bytes)} reserved per GPU predicted: {self._estimate.verdict}"
        )

    def record(self) -> dict[str, object]:
        """The prediction for the busiest rank, in the form that a file keeps."""
        if self._estimate is None:
            return {"note": self._note}
        rank = self._estimate.busiest
        return {
            "components": rank.components,
            "peak_allocated_bytes": rank.peak_allocated_bytes,
            **({"peak_reserved_bytes": rank.peak_reserved_bytes} if self._plan.device == "cuda" else {}),
            "verdict": str(self._estimate.verdict),
        }

    def step_done(self, *, updated: bool) -> None:
        """A training step of this process is finished. After the second update nothing is measured: checkpoints and the
        export gather tensors that a step does not."""
        self._updates += updated
        if updated and self._updates == STEPS:
            memory = peak_memory(self._runtime.device)
            if memory.allocated_bytes is not None:
                self._measured = memory.allocated_bytes, memory.reserved_bytes
            elif self._peak is not None:
                self._measured = self._peak.highest, None
            self._counting.close()

    def compare(self) -> Comparison:
        """Each rank against the estimate of its kind; the numbers are those of rank 0's answer. A collective."""
        everyone = self._runtime.gather(self._measured)
        if self._estimate is None:
            return Comparison(memory_note=self._note)
        predicted = [self._estimate.of_rank(self._plan, rank) for rank in range(len(everyone))]
        by_rank = [rank.peak_allocated_bytes for rank in predicted]
        pairs = [(p, m, rank) for rank, (p, m) in enumerate(zip(predicted, everyone, strict=True)) if m is not None]
        if not pairs:
            note = TOO_SHORT if self._updates < STEPS else NOT_COUNTED
            return self._comparison(self._estimate.busiest, memory_note=note, predicted_bytes_by_rank=by_rank)
        # A ratio of 0.8 is as far off as one of 1.25.
        furthest = max(pairs, key=lambda pair: max(_ratio(*pair[:2]), 1 / _ratio(*pair[:2])))
        rank, measured, number = furthest
        return self._comparison(
            rank,
            measured_allocated_bytes=measured[0],
            measured_reserved_bytes=measured[1],
            memory_ratio=_ratio(rank, measured),
            memory_rank=number,
            predicted_bytes_by_rank=by_rank,
            measured_bytes_by_rank=[pair[1][0] for pair in pairs] if len(pairs) == len(everyone) else None,
        )

    def _comparison(self, rank: RankEstimate, **measured: int | float | str | list[int] | None) -> Comparison:
        assert self._estimate is not None
        known = self._estimate.device.capacity_bytes is not None
        return Comparison(
            predicted_allocated_bytes=rank.peak_allocated_bytes,
            predicted_reserved_bytes=rank.peak_reserved_bytes,
            predicted_reserved_most_bytes=rank.peak_reserved_most_bytes,
            predicted_verdict=str(self._estimate.verdict) if known else None,
            libraries_bytes=self._libraries,
            **measured,  # pyright: ignore[reportArgumentType]
        )


def _ratio(predicted: RankEstimate, measured: Measured) -> float:
    return measured[0] / predicted.peak_allocated_bytes


class _Peak:
    """Maximum bytes that were ever alive, from the tracker's events."""

    def __init__(self) -> None:
        self._alive, self.highest = Alive(), 0

    def __call__(self, event: Event) -> None:
        self._alive.count(event)
        self.highest = max(self.highest, self._alive.total)
