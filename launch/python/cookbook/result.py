"""The result of a run: its folder, read on access."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import EXIT_FINISHED, EXIT_STOPPED


@dataclass(frozen=True, slots=True)
class Result:
    """folder: of the run. code: 0 finished, 75 stopped with a checkpoint, else a failure of a launched run."""

    folder: Path
    code: int

    @property
    def finished(self) -> bool:
        return self.code == EXIT_FINISHED

    @property
    def stopped(self) -> bool:
        """The run was asked to stop and has saved; the same call continues it."""
        return self.code == EXIT_STOPPED

    @property
    def summary(self) -> dict[str, Any]:
        """The keys of `trainer.report.metrics.Summary`; empty if the run has not finished."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Each line of metrics.jsonl; none if the run failed before its first step."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def model(self) -> Path | None:
        """The exported model, a Hugging Face folder; None with `train.export=false`."""
        folder = self.folder / "model"
        return folder if folder.exists() else None
