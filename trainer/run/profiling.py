"""`profile=true`: a step's calls, and its memory against the prediction. In RUN_DIR/profile:

    trace-rank0.json.gz     every operator and kernel of `profile_steps`, one file per rank: https://ui.perfetto.dev
    memory.json, .png       memory over the first two steps, predicted and measured, of one rank of each kind
    snapshot-rank0.pickle   GPUs: every allocation with its Python stack: https://docs.pytorch.org/memory_viz

The loop marks the beginning and end of a step, and its clock marks the parts; engines are not involved. Results do not
change. On the CPU the first two steps are slower, because each tensor is counted; `profile_steps` are therefore later
ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from configs.schema import Config
from trainer.axes import PIPELINE
from trainer.estimate.compose import STEPS
from trainer.estimate.estimate import RankEstimate
from trainer.estimate.tracker import StorageTracker
from trainer.plan.plan import Plan
from trainer.process.disks import writing, written
from trainer.process.runtime import Runtime
from trainer.report.memory_curve import Curve, Recorder, from_snapshot, save_curves
from trainer.report.prediction import Prediction

FOLDER = "profile"
log = logging.getLogger(__name__)


class Profiler:
    """Every rank makes one before its engine. Without `profile=true` it does nothing."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime, folder: Path, predicted: Prediction) -> None:
        self._wanted = frozenset(config.profile_steps) if config.profile else frozenset[int]()
        self._config, self._plan, self._runtime, self._predicted = config, plan, runtime, predicted
        self._folder = folder / FOLDER
        self._profile: profile | None = None
        self._recorder: Recorder | None = None
        self._counting = ExitStack()
        self._history = False
        self._marks: list[tuple[int, int, str]] = []
        self._steps = 0
        self._traces: list[str] = []
        self._kept: list[str] = []

    def __enter__(self) -> Profiler:
        if not self._wanted:
            return self
        with writing(self._folder.parent):
            self._folder.mkdir(exist_ok=True)
        if self._runtime.device.type == "cuda":
            torch.cuda.memory._record_memory_history(stacks="python")
            self._history = True
        elif not self._config.train.compile:  # compile fuses the counted operators
            self._recorder = Recorder()
            self._counting.enter_context(StorageTracker(on_event=self._recorder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """In any case stop recording. Recordings of a failed run are kept if possible."""
        self._counting.close()
        with suppress(Exception):
            self._stop_trace()
        with suppress(Exception):
            self._stop_history()
        if error is None and self._wanted and self._runtime.is_main:
            log.info(self.describe())

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one training step. step: from 1. A collective at the last of the first two steps."""
        if not self._wanted:
            yield
            return
        self._begin(step)
        with record_function(f"step {step}"):
            yield
        self.mark("")
        self._end(step)

    def mark(self, part: str) -> None:
        """A part of the step begins, by its name in the clock; "": work that does not belong to a step."""
        if self._recorder is not None and self._steps < STEPS:
            self._recorder.mark(self._steps + 1, part)
        elif self._history and self._steps < STEPS:
            self._marks.append((time.time_ns() // 1000, self._steps + 1, part))

    def describe(self) -> str:
        """The files, and how to open them: one line."""
        if not self._traces and not self._kept:
            return f"profile    nothing: this start of the run had none of profile_steps={sorted(self._wanted)}"
        found: list[str] = []
        if self._traces:
            found.append(f"{', '.join(self._traces)} and those of the other ranks (open at https://ui.perfetto.dev)")
        if self._kept:
            found.append(f"{', '.join(self._kept)} (memory, predicted and measured)")
        if list(self._folder.glob("snapshot-*")):
            found.append("snapshot-rank*.pickle (https://docs.pytorch.org/memory_viz)")
        return f"profile    {self._folder}: {'; '.join(found)}"

    def _begin(self, step: int) -> None:
        if self._profile is None and (step in self._wanted or step + 1 in self._wanted):
            activities = [ProfilerActivity.CPU]
            if self._runtime.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=lambda number: self._action(step + number),
                on_trace_ready=self._save_trace,
                record_shapes=True,
                profile_memory=True,
            )
            self._profile.start()

    def _action(self, step: int) -> ProfilerAction:
        """The profiler's action in a step: the step before a traced one warms it up, and is not kept."""
        if step not in self._wanted:
            return ProfilerAction.WARMUP
        return ProfilerAction.RECORD if step + 1 in self._wanted else ProfilerAction.RECORD_AND_SAVE

    def _end(self, step: int) -> None:
        self._steps += 1
        if step in self._wanted and step + 1 not in self._wanted:
            self._stop_trace()
        elif self._profile is not None:
            self._profile.step()
        if self._steps == STEPS:
            self._counting.close()
            self._compare()
        if self._steps >= STEPS and step >= max(self._wanted):
            self._stop_history()

    def _stop_trace(self) -> None:
        tracing, self._profile = self._profile, None
        if tracing is not None:
            tracing.stop()

    def _save_trace(self, tracing: profile) -> None:
        # Steps that do not follow one another make several files.
        names = (f"trace-rank{self._runtime.rank}{'' if n == 1 else f'-{n}'}.json.gz" for n in count(1))
        name = next(name for name in names if not (self._folder / name).exists())
        with written("the profile", self._folder):
            tracing.export_chrome_trace(str(self._folder / name))
        self._traces.append(name)

    def _stop_history(self) -> None:
        if not self._history:
            return
        self._history = False
        try:
            with written("the profile", self._folder):
                file = self._folder / f"snapshot-rank{self._runtime.rank}.pickle"
                torch.cuda.memory._dump_snapshot(str(file))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _compare(self) -> None:
        """Rank 0 writes the curves of one rank of each kind, the fullest. A collective."""
        curves = self._runtime.gather(self._measured())
        if not self._runtime.is_main or not all(curves):
            return
        fullest: dict[int, int] = {}
        for rank, curve in enumerate(curves):
            stage = self._plan.coordinates(rank)[PIPELINE]
            if stage not in fullest or _peak(curve) > _peak(curves[fullest[stage]]):
                fullest[stage] = rank
        ranks = {rank: (self._estimate(rank), curves[rank]) for rank in fullest.values()}
        with written("the profile", self._folder):
            self._kept = [path.name for path in save_curves(self._folder, ranks)]

    def _measured(self) -> Curve:
        if self._recorder is not None:
            return self._recorder.curve()
        if self._history:
            device = torch.cuda.current_device()
            return from_snapshot(torch.cuda.memory._snapshot(), device, self._marks)
        return {}

    def _estimate(self, rank: int) -> RankEstimate | None:
        found = self._predicted.estimate
        return found.of_rank(self._plan, rank) if found is not None else None


def _peak(curve: Curve) -> int:
    return max(max(sizes) for sizes in curve.values())
