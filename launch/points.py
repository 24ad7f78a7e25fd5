"""The runs of a comparison, planned together: names, one global batch for all, one model and one data set.

parallel=single,ddp train.steps=20   ->   single: parallel=single train.steps=20 ... train.run_dir=FOLDER/single
                                          ddp: parallel=ddp train.steps=20 ... train.run_dir=FOLDER/ddp
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from math import lcm
from pathlib import Path

from configs.errors import ConfigError, CookbookError, PlanError
from configs.load import expand_sweep, from_yaml, load_config
from configs.overrides import quote_value
from configs.schema import Config
from launch.clusters import elsewhere
from launch.comparison.runs import SAME, differences
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.report.folder import default_run_dir

USUAL = ("train.export=false", "checkpoint.final=false")
"""Defaults of a comparison, which needs no model or checkpoint of every run; explicit values override them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run. overrides: including the run folder. config, plan: None if it is refused, for `reason`.
    reason is also why a run failed that could not report it itself."""

    name: str
    overrides: tuple[str, ...]
    config: Config | None = None
    plan: Plan | None = None
    reason: str | None = None


def plan_points(overrides: Sequence[str], *, config_dir: str | None) -> tuple[Path, list[Point]]:
    """The comparison's folder, and its runs in the order of the arguments.

    All get the same train.global_batch_size: the smallest that each of them can make. Raises CookbookError for fewer
    than two runs, for different models or data, and if no run can be planned.
    """
    runs = expand_sweep(overrides)
    if len(runs) < 2:
        raise ConfigError("compare: needs at least two runs: give a list, parallel=single,ddp, or a folder of runs")
    places = list(dict.fromkeys(word for run in runs for word in run if word.startswith("train.run_dir=")))
    if len(places) > 1:
        raise ConfigError("train.run_dir: is the folder of the whole comparison; give one")
    plain = [tuple(word for word in run if word not in places) for run in runs]
    found = [
        _plan(Point(name=name, overrides=(*USUAL, *run)), config_dir)
        for name, run in zip(names(plain), plain, strict=True)
    ]
    sizes = {point.plan.batch.global_batch_size: point.name for point in found if point.plan is not None}
    if len(sizes) > 1:
        found = _one_batch(found, sizes, config_dir)
    configs = [point.config for point in found if point.config is not None]
    if not configs:
        raise PlanError(*dict.fromkeys(point.reason or "" for point in found))
    _check_same(found, configs[0])
    named = load_config(places, config_dir=config_dir).train.run_dir
    folder = Path(named) if named is not None else _default(configs[0])
    settled: list[Point] = []
    for point in found:
        own = (*point.overrides, f"train.run_dir={quote_value(str(folder / point.name))}")
        config = load_config(own, config_dir=config_dir) if point.plan is not None else None
        settled.append(replace(point, overrides=own, config=config))
    return folder.expanduser(), settled


def check_folder(point: Point, folder: Path) -> None:
    """Raise PlanError if `folder`, the point's folder, holds another run."""
    try:
        saved = from_yaml((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, CookbookError):
        return
    if point.config is not None and (other := differences(point.config, saved)):
        raise PlanError(
            f"{folder}: holds a run without {', '.join(other)}; choose another train.run_dir, or delete that run"
        )


def _plan(point: Point, config_dir: str | None) -> Point:
    config = load_config(point.overrides, config_dir=config_dir)
    if (cluster := elsewhere(config.cluster.kind)) is not None:
        raise ConfigError(
            f"cluster.kind={config.cluster.kind}: compare runs one point after another on this machine;"
            f" {cluster.COMPARE}"
        )
    try:
        plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
    except PlanError as error:
        return replace(point, config=None, plan=None, reason="; ".join(error.problems))
    if plan.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={plan.nodes}: compare starts its runs on this machine alone; set it to 1, or start them"
            " node by node and compare their folders"
        )
    return replace(point, config=config, plan=plan)


def _one_batch(points: Sequence[Point], sizes: dict[int, str], config_dir: str | None) -> list[Point]:
    """The same points with one global batch. sizes: each size without it, with the last point that has it."""
    had = ", ".join(f"{size} ({name})" for size, name in sizes.items())
    if any(word.startswith("train.global_batch_size=") for point in points for word in point.overrides):
        raise PlanError(f"train.global_batch_size: is {had}, and losses of different batches do not compare; give one")
    size = lcm(*sizes)
    print(f"train.global_batch_size={size} for all; each alone would have had {had}")
    return [
        _plan(replace(point, overrides=(*point.overrides, f"train.global_batch_size={size}")), config_dir)
        if point.plan is not None
        else point
        for point in points
    ]


def _check_same(points: Sequence[Point], first: Config) -> None:
    for point in points:
        other = differences(point.config, first) if point.config is not None else []
        found = next((word for word in other if word.startswith(SAME)), None)
        if found is not None:
            raise PlanError(
                f"{found}: not so in every run ({point.name} has it); a comparison is of one model, one data set and as"
                " many steps: give one value"
            )


def names(runs: Sequence[Sequence[str]], *, keys: bool = False) -> list[str]:
    """The runs' differences as folder names: the option of a group; of a key the last part and the value. keys: use the
    full overrides, parallel=ddp,train.seed=2."""
    shared = set(runs[0]).intersection(*runs)
    found: list[str] = []
    for overrides in runs:
        parts: list[str] = []
        for word in overrides:
            key, _, value = word.partition("=")
            if word not in shared:
                parts.append(word if keys else f"{key.rpartition('.')[2]}-{value}" if "." in key else value)
        text = ",".join(parts) if keys else "-".join(parts)
        # A folder name has at most 255 bytes.
        name = re.sub(r"[^\w.=,+-]+" if keys else r"[^\w.-]+", "_", text, flags=re.ASCII).strip("._")[:200] or "run"
        taken = sum(other == name or other.startswith(f"{name}~") for other in found)
        found.append(f"{name}~{taken + 1}" if taken else name)
    return found


def _default(config: Config) -> Path:
    """runs/MODEL-compare-PRECISION/DATE-TIME"""
    return default_run_dir(replace(config, parallel=replace(config.parallel, preset="compare")), datetime.now())
