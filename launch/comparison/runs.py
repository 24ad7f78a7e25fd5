"""A run as its folder tells it, and how far it is from another.

    config.yaml      what ran
    status.json      how it ended
    metrics.jsonl    loss, gradient norm, validation, speed, memory
    versions.json    on what

Nothing is measured here, and a folder that is damaged is an answer, not an error: `problem` says in a line why a run
cannot be compared. Next: `table`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import CookbookError
from configs.keys import as_text
from configs.load import from_yaml
from configs.schema import Config
from trainer.axes import degrees
from trainer.process.files import read_json
from trainer.process.status import FINISHED, RUNNING, read_status

# What a run leaves behind and where: two runs that differ in these alone are the same training.
PLACES = ("train.run_dir", "train.resume", "train.export", "data.cache_dir", "data.num_workers", "checkpoint.")
PLACES += ("logging.", "profile", "dry_run")
SAME = ("model", "data", "train.steps")
"""Begin the keys that runs must share for their losses to be comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """name: its folder's, within the comparison. problem: why it is not through; None: it is. losses, grad_norms,
    validations: by step. summary: the last line of metrics.jsonl, with the keys of `trainer.report.metrics.Summary`."""

    name: str
    problem: str | None
    config: Config | None = None
    losses: Mapping[int, float] = field(default_factory=dict)
    grad_norms: Mapping[int, float] = field(default_factory=dict)
    validations: Mapping[int, float] = field(default_factory=dict)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """From the reference: |a - b| / |b|, the largest over the steps that both have logged. None: none of them."""

    steps: int
    loss: float | None
    grad_norm: float | None
    validation: float | None


def read_run(name: str, folder: Path, reason: str | None = None) -> Run:
    """The run in a folder. reason: why it did not begin or end, where that is known and the folder does not say."""
    try:
        config = from_yaml((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, CookbookError):
        missing = "no run was begun here" if not folder.exists() else "config.yaml: missing or damaged"
        return Run(name=name, problem=reason or missing)
    lines, damage = _read_lines(folder / "metrics.jsonl")
    summaries = [line for line in lines if line["kind"] == "summary"]
    problem = damage or _state(folder, reason)
    if problem is None and not summaries:
        problem = "metrics.jsonl: the summary at its end is missing"
    steps = [line for line in lines if line["kind"] == "step"]
    return Run(
        name=name,
        problem=problem,
        config=config,
        losses=_column(steps, "loss"),
        grad_norms=_column(steps, "grad_norm"),
        validations=_column([line for line in lines if line["kind"] == "validation"], "validation_loss"),
        tokens_per_step=steps[0]["tokens"] // steps[0]["step"] if steps else None,
        summary=summaries[-1] if summaries else {},
        versions=read_json(folder / "versions.json"),
    )


def distance(run: Run, reference: Run) -> Distance | None:
    """None where the losses cannot be compared: of another model, other data or another batch."""
    if incomparable(run, reference):
        return None
    return Distance(
        steps=len(run.losses.keys() & reference.losses.keys()),
        loss=_furthest(run.losses, reference.losses),
        grad_norm=_furthest(run.grad_norms, reference.grad_norms),
        validation=_furthest(run.validations, reference.validations),
    )


def incomparable(run: Run, reference: Run) -> list[str]:
    """What makes the losses of two runs another matter: key=value of the first."""
    if run.config is None or reference.config is None:
        return ["no config.yaml"]
    found = [word for word in differences(run.config, reference.config) if word.startswith(SAME)]
    if run.tokens_per_step != reference.tokens_per_step:
        found.append(f"{run.tokens_per_step} tokens per step")
    return found


def find_reference(runs: Sequence[Run]) -> Run | None:
    """The run that the others are held against: the first finished one on one process, else the first finished."""
    finished = [run for run in runs if run.problem is None]
    alone = (run for run in finished if run.config is not None and set(degrees(run.config).values()) == {1})
    return next(alone, finished[0] if finished else None)


def differences(config: Config, other: Config) -> list[str]:
    """key=value of `config` wherever the other has another value. A preset stands for the keys of its group."""
    here, there = flat(config), flat(other)
    changed = [key for key in here if here[key] != there.get(key) and not key.startswith(PLACES)]
    groups = tuple(f"{key.removesuffix('preset')}" for key in changed if key.endswith(".preset"))
    words = []
    for key in changed:
        if key.endswith(".preset"):
            words.append(f"{key.removesuffix('.preset')}={here[key]}")
        elif not (groups and key.startswith(groups)):
            words.append(f"{key}={as_text(here[key])}")
    return words


def flat(config: Config) -> dict[str, Any]:
    """Every key with its value: {"train.steps": 100, ...}."""
    return dict(_leaves(asdict(config), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "model.architecture":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _state(folder: Path, reason: str | None) -> str | None:
    """Why a run is not through, from status.json; None: it is."""
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
    """The lines up to the first that is damaged, and a line about that one."""
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


def _furthest(values: Mapping[int, float], reference: Mapping[int, float]) -> float | None:
    pairs = [(values[step], reference[step]) for step in values.keys() & reference.keys()]
    return max((abs(a - b) / abs(b) if b else float(a != b) for a, b in pairs), default=None)
