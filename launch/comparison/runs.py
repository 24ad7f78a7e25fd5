"""How a run differs from another: in its losses (read by `trainer.report.reading`) and its keys. Next: `table`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from configs.keys import as_text
from configs.schema import Config
from trainer.axes import degrees
from trainer.report.reading import Run

# Output settings: two runs that differ only in these are the same training.
PLACES = ("train.run_dir", "train.resume", "train.export", "data.cache_dir", "data.num_workers", "checkpoint.")
PLACES += ("logging.", "profile", "dry_run")
SAME = ("model", "data", "train.steps", "train.epochs")
"""Prefixes of the keys that runs must share for their losses to be comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """Largest relative difference |a - b| / |b| over the steps that both runs logged. None: no common step."""

    steps: int
    loss: float | None
    grad_norm: float | None
    validation: float | None


def distance(run: Run, reference: Run) -> Distance | None:
    """None if the losses are not comparable: another model, other data or another batch."""
    if incomparable(run, reference):
        return None
    return Distance(
        steps=len(run.losses.keys() & reference.losses.keys()),
        loss=_furthest(run.losses, reference.losses),
        grad_norm=_furthest(run.grad_norms, reference.grad_norms),
        validation=_furthest(run.validations, reference.validations),
    )


def incomparable(run: Run, reference: Run) -> list[str]:
    """Why the two runs' losses are not comparable: key=value of the first."""
    if run.config is None or reference.config is None:
        return ["no config.yaml"]
    found = [word for word in differences(run.config, reference.config) if word.startswith(SAME)]
    if run.tokens_per_step != reference.tokens_per_step:
        found.append(f"{run.tokens_per_step} tokens per step")
    return found


def find_reference(runs: Sequence[Run]) -> Run | None:
    """The run that the others are compared with: the first finished one on one process, else the first finished."""
    finished = [run for run in runs if run.problem is None]
    alone = (run for run in finished if run.config is not None and set(degrees(run.config).values()) == {1})
    return next(alone, finished[0] if finished else None)


def differences(config: Config, other: Config) -> list[str]:
    """key=value of `config` for each key whose value differs. A preset stands for the keys of its group."""
    here, there = flat(config), flat(other)
    changed = [key for key in here if here[key] != there.get(key) and not key.startswith(PLACES)]
    groups = tuple(f"{key.removesuffix('preset')}" for key in changed if key.endswith(".preset"))
    overrides = []
    for key in changed:
        if key.endswith(".preset"):
            overrides.append(f"{key.removesuffix('.preset')}={here[key]}")
        elif not (groups and key.startswith(groups)):
            overrides.append(f"{key}={as_text(here[key])}")
    return overrides


def flat(config: Config) -> dict[str, Any]:
    """Every key with its value: {"train.steps": 100, ...}."""
    return dict(_leaves(asdict(config), ""))


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "model.architecture":
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _furthest(values: Mapping[int, float], reference: Mapping[int, float]) -> float | None:
    pairs = [(values[step], reference[step]) for step in values.keys() & reference.keys()]
    return max((abs(a - b) / abs(b) if b else float(a != b) for a, b in pairs), default=None)
