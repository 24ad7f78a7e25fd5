"""A run, read from its folder.

    config.yaml      what ran
    status.json      how it ended
    metrics.jsonl    loss, gradient norm, validation, speed, memory
    versions.json    on what

Nothing is measured here. A damaged folder is a result, not an error: `problem` gives in one line why a run has not
finished, or cannot be read. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import CookbookError
from configs.load import from_yaml
from configs.schema import Config
from trainer.process.files import read_json
from trainer.process.status import FINISHED, RUNNING, read_status


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """name: its folder's, within a comparison. problem: why it has not finished; None if it has. losses, grad_norms,
    validations: by step. steps, summary: lines of metrics.jsonl, with the keys of `StepMetrics` and `Summary` in
    `trainer.report.metrics`; the summary is the last line."""

    name: str
    problem: str | None
    folder: Path | None = None
    config: Config | None = None
    losses: Mapping[int, float] = field(default_factory=dict)
    grad_norms: Mapping[int, float] = field(default_factory=dict)
    validations: Mapping[int, float] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    tokens_per_step: int | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicted_bytes(self) -> list[int]:
        """Of every rank; empty: not estimated."""
        return self._memory("predicted_bytes_by_rank", "predicted_allocated_bytes")

    @property
    def measured_bytes(self) -> list[int]:
        """Of every rank; empty: not measured."""
        return self._memory("measured_bytes_by_rank", "measured_allocated_bytes")

    def _memory(self, by_rank: str, one: str) -> list[int]:
        memory = self.summary.get("memory") or {}
        single = memory.get(one)
        return memory.get(by_rank) or ([single] if single is not None else [])


def read_run(name: str, folder: Path, reason: str | None = None) -> Run:
    """The run in a folder. reason: why it did not begin or end, if known from elsewhere than the folder."""
    try:
        config = from_yaml((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, CookbookError):
        missing = "no run was begun here" if not folder.exists() else "config.yaml: missing or damaged"
        return Run(name=name, problem=reason or missing)  # without a folder, which holds nothing
    lines, damage = _read_lines(folder / "metrics.jsonl")
    summaries = [line for line in lines if line["kind"] == "summary"]
    problem = damage or _state(folder, reason)
    if problem is None and not summaries:
        problem = "metrics.jsonl: the summary at its end is missing"
    steps = [line for line in lines if line["kind"] == "step"]
    return Run(
        name=name,
        problem=problem,
        folder=folder,
        config=config,
        losses=_column(steps, "loss"),
        grad_norms=_column(steps, "grad_norm"),
        validations=_column([line for line in lines if line["kind"] == "validation"], "validation_loss"),
        steps=steps,
        tokens_per_step=steps[0]["tokens"] // steps[0]["step"] if steps else None,
        summary=summaries[-1] if summaries else {},
        versions=read_json(folder / "versions.json"),
    )


def _state(folder: Path, reason: str | None) -> str | None:
    """Why a run has not finished, from status.json; None if it has."""
    status = read_status(folder)
    state = status.get("state")
    if state == FINISHED:
        return None
    if state == RUNNING:
        return reason or f"still running, or killed, after step {status.get('step')}"
    if state is None:
        return reason or "status.json: missing or damaged"
    return f"{state} at step {status.get('step')}: {status.get('reason')}"


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The lines up to the first damaged one, and a line about that one."""
    found: list[dict[str, Any]] = []
    try:
        texts = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return [], "metrics.jsonl: missing or damaged"
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            complete = isinstance(line["kind"], str) and (line["kind"] != "step" or line["step"] + line["tokens"] > 0)
        except (ValueError, KeyError, TypeError):
            complete, line = False, {}
        if not complete:
            return found, f"metrics.jsonl: line {number} is damaged"
        found.append(line)
    return found, None


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in lines if line.get(key) is not None}
