"""Shared by exports for other trainers: the opened checkpoint, and a folder that appears complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import CheckpointMismatch, ConfigError, EnvironmentProblem
from configs.load import from_yaml
from configs.schema import Config
from trainer import linear
from trainer.checkpoint.export import newest_whole
from trainer.checkpoint.progress import Progress, read_progress
from trainer.checkpoint.tensors import TensorReader
from trainer.optim import table
from trainer.optim.build import lr_at
from trainer.process.disks import readable, refused

STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    """folder: of the checkpoint. names: of its parameters. partial: temporary folder of the target."""

    folder: Path
    progress: Progress
    saved: TensorReader
    names: list[str]
    partial: Path

    def config(self) -> Config | None:
        """The run's config; None if no run has written the checkpoint."""
        try:
            return from_yaml((self.folder.parent.parent / "config.yaml").read_text())
        except (OSError, UnicodeDecodeError, ConfigError):
            return None

    def next_lr(self) -> float | None:
        """Learning rate of the next update: by the run's configuration, else from the original trainer."""
        config = self.config()
        return lr_at(config, self.progress.step) if config is not None else self.progress.origin.get("next_lr")


@contextmanager
def outgoing(source: Path, target: Path, *, what: str) -> Iterator[Outgoing]:
    """The checkpoint, or the newest intact one of a run. what: the export, which needs the moments of AdamW.

    Raises CheckpointDamaged or CheckpointMismatch if none can be exported, EnvironmentProblem if the target exists or
    cannot be written.
    """
    with readable(target):
        exists = target.exists()
    if exists:
        raise EnvironmentProblem(f"{target}: exists; choose another folder")
    folder, manifest = newest_whole(source)
    progress, saved = read_progress(folder, manifest), TensorReader(folder, manifest)
    names = _names(folder, saved, progress, what)
    partial = target.with_name(target.name + ".partial")
    with refused(
        target,
        lambda why: EnvironmentProblem(f"{target}: cannot be written ({why}); make room, or choose another folder"),
    ):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield Outgoing(folder=folder, progress=progress, saved=saved, names=names, partial=partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _names(folder: Path, saved: TensorReader, progress: Progress, what: str) -> list[str]:
    kinds = {key.partition("/")[0] for key in saved.names()} - {"rng"}
    if "frozen" in kinds or not linear.kept_model(progress.identity):
        raise CheckpointMismatch(f"{folder}: trained adapters, which {what} has no names for; export them for peft")
    if kinds != {"model", *STATES}:
        has = ", ".join(sorted(kinds - {"model"})) or "no states"
        raise CheckpointMismatch(
            f"{folder}: holds {has} of {table.NAME}={progress.identity[table.NAME]}, and {what}"
            f" {' and '.join(STATES)} of AdamW; export the model alone"
        )
    return [key.removeprefix("model/") for key in saved.names() if key.startswith("model/")]
