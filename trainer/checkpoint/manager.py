"""The checkpoint manager of a run: where to begin, when to save, which checkpoints to keep.

    manager = CheckpointManager(config, plan, runtime, run_dir, identity=..., tokenizer=..., stop=...)
    found = manager.find()                      before the engine is built: a mistake costs seconds
    manager.restore(engine)
    for each step: reason = manager.after_step(step, engine, ...)

Every rank has one and makes the same calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.choices import OnFailure
from configs.errors import CheckpointDamaged, CheckpointFailed, CheckpointMismatch
from configs.schema import Config
from trainer import linear
from trainer.checkpoint import catalog
from trainer.checkpoint.foreign.bring import bring
from trainer.checkpoint.foreign.compare import contradictions
from trainer.checkpoint.foreign.table import known
from trainer.checkpoint.manifest import STATE, Manifest, check_contents, check_file_sizes, read_manifest
from trainer.checkpoint.progress import Progress, check_same, find_best, layout, read_progress
from trainer.checkpoint.saving import Save
from trainer.checkpoint.selection import Selection
from trainer.checkpoint.tensors import TensorReader
from trainer.engine import Engine
from trainer.engine.saved import BUFFER
from trainer.model.fitting import persistent_buffers
from trainer.plan.plan import Plan
from trainer.process.disks import readable, writing
from trainer.process.runtime import Runtime, dropout_stream
from trainer.process.stopping import StopRequests
from trainer.process.watchdog import watched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedCheckpoint:
    """A committed checkpoint. blocked_seconds: checkpoint stall of the training. seconds: from its begin to its
    commit."""

    step: int
    folder: Path
    bytes: int
    blocked_seconds: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint that has passed every check."""

    folder: Path
    manifest: Manifest
    progress: Progress


class CheckpointManager:
    """identity: from `progress.identity`. generation: from `export.generation_config`, on rank 0. stop: this rank's
    requests to stop."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        runtime: Runtime,
        run_dir: Path,
        *,
        identity: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        generation: bytes | None = None,
        stop: StopRequests,
    ) -> None:
        self._config, self._plan, self._runtime = config, plan, runtime
        self._folder = run_dir / catalog.CHECKPOINTS
        self._identity, self._tokenizer, self._generation, self._stop = identity, tokenizer, generation, stop
        self._found: Found | None = None
        self._pending: Save | None = None
        self._begun = self._blocked = 0.0
        self._tell: Callable[[SavedCheckpoint], None] = lambda saved: None
        self.step = 0
        self.selection = Selection(config)

    def find(self) -> Progress | None:
        """Where the run begins: at its own newest intact checkpoint, else at `train.resume`, else at step 0 (None).

        A collective. Damaged checkpoints are named and skipped. Raises CheckpointDamaged if there are checkpoints but
        none is intact, CheckpointMismatch if the one to continue belongs to another run, EnvironmentProblem if a
        checkpoint cannot be
        read: it may be intact.
        """
        self._as_main(lambda: catalog.tidy(self._folder))
        own = self._listed(self._folder)
        candidates, ours = (own, True) if own else (self._elsewhere(), False)
        damaged: list[Path] = []
        problems: list[str] = []
        for candidate in reversed(candidates):
            try:
                self._found = self._check(candidate)
                break
            except CheckpointDamaged as damage:
                self._say(*damage.problems, f"{candidate}: damaged, passed over")
                damaged.append(candidate)
                problems += damage.problems
        if self._found is None:
            if damaged:
                raise CheckpointDamaged(*problems, f"{damaged[0].parent}: holds no checkpoint that is whole")
            if (self._folder.parent / "metrics.jsonl").exists():
                self._say(f"{self._folder.parent}: holds no checkpoint yet; the run begins again at step 0")
            return None
        if ours:
            self._as_main(lambda: [catalog.set_aside(checkpoint) for checkpoint in damaged])
        self.step = self._found.progress.step
        if ours:
            there = {catalog.step_of(checkpoint) or 0 for checkpoint in own if checkpoint not in damaged}
            self.selection.restore(self._found.progress.selection, there)
        elif self.step >= self._plan.steps:
            place = catalog.final_of(self._found.folder)
            self._say(
                f"{place}: stands at step {self.step}, and this run has {self._plan.steps} steps, all in"
                " all: nothing is left to train; give more train.steps, or train.epochs"
            )
        return self._found.progress

    def summary(self) -> dict[str, Any]:
        """The best validation, for the run's status."""
        return self.selection.summary(self._folder)

    def best(self) -> Path | None:
        """The checkpoint of the best validation, if it is kept."""
        return self._folder / catalog.step_name(self.selection.kept) if self.selection.kept is not None else None

    def report_to(self, tell: Callable[[SavedCheckpoint], None]) -> None:
        """tell: called on every rank for each committed checkpoint."""
        self._tell = tell

    def restore(self, engine: Engine) -> None:
        """Load the found checkpoint, if any, into the engine and the random generators. An imported one becomes the
        run's own by that. A collective."""
        if self._found is None:
            return
        folder, final = self._found.folder, catalog.final_of(self._found.folder)
        saved = TensorReader(folder, self._found.manifest)
        progress = self._found.progress
        self._runtime.agree(lambda: engine.load_state(saved, progress.engine))
        self._restore_random_numbers(saved, progress)
        if folder != final:
            self._as_main(lambda: catalog.commit(folder))
        self._say(f"resumed    step {progress.step} from {final}")

    def after_step(
        self,
        step: int,
        engine: Engine,
        *,
        samples: int,
        data: Callable[[], Any] = lambda: None,
        report: Callable[[], dict[str, Any]],
    ) -> str | None:
        """Save if it is due. Returns why the run is to stop, if any rank was asked to; else None.

        step: number of updates so far. samples: the corresponding position in the data. data, report: state of the data
        and the reporter to restore. A collective. Raises CheckpointFailed on every rank if a save failed and
        `checkpoint.on_failure` is stop.
        """
        settings = self._config.checkpoint
        unfinished = self._pending is not None and not self._pending.done
        self.step = step
        reason = self._stop.reason()
        stopping, writing = (bool(flag) for flag in self._runtime.max(reason is not None, unfinished))
        if self._pending is not None and not writing:
            self._guard(self._pending.progress.step, self._commit)
        last = step >= self._plan.steps or self.selection.ended is not None
        due = self.selection.due(step) or (settings.every > 0 and step % settings.every == 0)
        if stopping or due or (last and settings.final):
            progress = Progress(
                step=step,
                samples=samples,
                data=data(),
                engine=engine.counters(),
                identity=self._identity,
                layout=layout(self._plan),
                report=report(),
                selection=self.selection.state(),
            )
            self._guard(step, lambda: self._save(engine, progress))
        if stopping or last:
            self._guard(step, self._commit)
        return self._agree_on(reason) if stopping else None

    def _agree_on(self, reason: str | None) -> str:
        """The first rank's reason to stop, on every rank. A collective."""
        self._stop.obeyed()
        return next(f"rank {rank}: {given}" for rank, given in enumerate(self._runtime.gather(reason)) if given)

    def _save(self, engine: Engine, progress: Progress) -> None:
        self._commit()
        self._begun = time.perf_counter()
        save = Save(catalog.partial_folder(self._folder, progress.step), progress, self._runtime, engine.kinds)
        save.begin()
        aside = self._config.checkpoint.async_save
        (save.write_aside if aside else save.write)(self._state(engine))
        self._pending, self._blocked = save, time.perf_counter() - self._begun
        if not aside:
            self._commit()

    def _commit(self) -> None:
        """Commit the save that is under way, if any; waits for its writing."""
        save, self._pending = self._pending, None
        if save is None:
            return
        before = time.perf_counter()
        folder, size = save.commit(self._tokenizer, self._generation)
        self.selection.saved(save.progress.selection)
        if self._runtime.is_main:
            self._delete_surplus()
        now = time.perf_counter()
        aside = self._config.checkpoint.async_save
        self._tell(
            SavedCheckpoint(
                step=save.progress.step,
                folder=folder,
                bytes=size,
                blocked_seconds=self._blocked + (now - before) if aside else now - self._begun,
                seconds=now - self._begun,
            )
        )

    def _guard(self, step: int, work: Callable[[], None]) -> None:
        """step: the last one without a checkpoint, should the work fail."""
        try:
            work()
        except CheckpointFailed as failure:
            self._pending = None
            self.selection.lost(step)
            if self._config.checkpoint.on_failure is OnFailure.stop:
                raise
            self._say(*(f"{problem}; training goes on without it" for problem in failure.problems))

    def _delete_surplus(self) -> None:
        settings = self._config.checkpoint
        checkpoints = catalog.committed(self._folder)
        keep = {"keep_last": settings.keep_last, "keep_every": settings.keep_every, "best": self.selection.kept}
        for old in catalog.surplus(checkpoints, **keep):
            try:
                catalog.delete(old)
            except OSError as error:
                log.warning("%s: cannot be deleted (%s)", old, error.strerror)

    def _state(self, engine: Engine) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The engine's tensors and this rank's random generators."""
        yield from watched(engine.state(), "saving a checkpoint")
        rank = self._runtime.rank
        if rank == 0 and linear.keeps_model(self._config):
            yield from ((f"{BUFFER}/{name}", buffer) for name, buffer in persistent_buffers(engine.model))
        yield f"rng/cpu-{rank:05d}", torch.get_rng_state()
        if self._runtime.device.type == "cuda":
            yield f"rng/cuda-{rank:05d}", torch.cuda.get_rng_state(self._runtime.device)

    def _restore_random_numbers(self, saved: TensorReader, progress: Progress) -> None:
        """Under the same layout the same streams continue. Under another one the ranks have changed: new streams, which
        do not repeat those of the run's start."""
        rank, device = self._runtime.rank, self._runtime.device
        if progress.layout != layout(self._plan):
            stream = dropout_stream(self._plan, rank)
            torch.manual_seed(self._config.train.seed + stream + 1_000_003 * progress.step)
            return
        torch.set_rng_state(saved.read(f"rng/cpu-{rank:05d}").clone())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved.read(f"rng/cuda-{rank:05d}").clone(), device)

    def _as_main(self, work: Callable[[], object]) -> None:
        """Apply this to the run folder, on rank 0. A collective. Raises EnvironmentProblem if it cannot be written."""

        def do() -> None:
            if self._runtime.is_main:
                with writing(self._folder.parent):
                    work()

        self._runtime.agree(do)

    def _listed(self, folder: Path) -> list[Path]:
        """Committed checkpoints as rank 0 sees them, on every rank, oldest first."""
        found = self._runtime.agree(lambda: catalog.committed(folder) if self._runtime.is_main else [])
        names = self._runtime.broadcast("\n".join(path.name for path in found))
        return [folder / name for name in names.split("\n") if name]

    def _elsewhere(self) -> list[Path]:
        """What `train.resume` names: a checkpoint, or the checkpoints of another run."""
        wanted = self._config.train.resume
        if wanted in ("auto", "never"):
            return []
        path = self._runtime.agree(lambda: find_best(Path(wanted).expanduser().absolute()))
        listed = self._listed(path) or self._listed(path / catalog.CHECKPOINTS)
        if listed:
            return listed
        with readable(path / STATE):
            is_checkpoint = (path / STATE).is_file()
        if is_checkpoint:
            return [path]
        run = (self._config, self._plan, self._runtime)
        if made := bring(path, self._folder, *run, identity=self._identity, tokenizer=self._tokenizer):
            return made
        raise CheckpointMismatch(
            f"train.resume={wanted}: is no checkpoint and holds none; give auto, never, RUN_DIR or"
            f" RUN_DIR/{catalog.CHECKPOINTS}/{catalog.step_name(100)}, or of another trainer {known()}"
        )

    def _check(self, folder: Path) -> Found:
        """Raises on every rank alike. Each rank hashes its share of the files."""

        def check() -> Found | CheckpointDamaged:
            try:
                manifest = read_manifest(folder)
                check_file_sizes(folder, manifest)
                names = list(manifest.files)
                check_contents(folder, manifest, names[self._runtime.rank :: self._runtime.world_size])
                return Found(folder=folder, manifest=manifest, progress=read_progress(folder, manifest))
            except CheckpointDamaged as damage:
                return damage

        # In two steps: a file that one rank cannot read must not count as damaged because another rank finds damage.
        found = self._runtime.agree(check)
        found = self._runtime.agree(lambda: _whole(found))
        batch, final = self._plan.batch.global_batch_size, catalog.final_of(folder)
        check_same(found.progress, self._identity, source=final, global_batch_size=batch)
        self._say(*contradictions(found.progress, self._config, source=final, global_batch_size=batch))
        return found

    def _say(self, *lines: str) -> None:
        if self._runtime.is_main:
            for line in lines:
                log.warning(line)


def _whole(found: Found | CheckpointDamaged) -> Found:
    if isinstance(found, CheckpointDamaged):
        raise found
    return found
