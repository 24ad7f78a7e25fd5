"""The functions. Each takes a configuration from `compose`; fields that were changed since are checked again."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configs import load
from configs.errors import ConfigError
from configs.explain import explain
from configs.interpolation import settle_clock
from configs.keys import schema_keys, set_value, value_at
from configs.load import from_yaml, load_config, to_yaml
from configs.overrides import quote_value, settled
from configs.ranges import check_ranges
from configs.schema import Config
from cookbook.result import Result
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from trainer.estimate.estimate import Estimate
    from trainer.estimate.search.search import Search
    from trainer.report.callbacks import Callback


# `@hydra.main` of a script that imports this package finds the schema that configs/config.yaml names.
load.introduce()


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """The configuration for these overrides, as on a command line.

    overrides: `group=option` or `key=value`, each one text.
    config_dir: a folder with further options.
    Raises ConfigError with every problem.
    """
    return load_config(settle_clock(overrides, datetime.now()), config_dir=str(config_dir) if config_dir else None)


def from_hydra(composed: DictConfig) -> Config:
    """The configuration that `@hydra.main(config_path="pkg://configs", config_name="config")` passes to a function.

    Raises ConfigError with every problem.
    """
    return load.from_hydra(composed)


def plan(config: Config) -> Plan:
    """The run's mesh and batch, on this machine or on the cluster that the configuration names.

    Raises PlanError with every combination that cannot run.
    """
    return make_plan(_checked(config), replace(find_machine(), world_size=None, local_world_size=None))


def estimate(config: Config) -> Estimate:
    """The predicted memory of each kind of rank, computed without a GPU; `memory-estimate` renders the same.

    Raises PlanError, and NotEstimated for a model whose code cannot be traced.
    """
    from trainer.estimate.estimate import estimate as predict
    from trainer.estimate.estimate import planned_machine

    config = _checked(config)
    return predict(config, make_plan(config, planned_machine(config, find_machine({}))))


def search(config: Config) -> Search:
    """The layouts of the configuration's cluster that fit, ranked by predicted speed.

    Raises PlanError where no layout can be tried.
    """
    from trainer.estimate.estimate import planned_machine
    from trainer.estimate.search.search import search as rank

    config = _checked(config)
    return rank(config, planned_machine(config, find_machine({})))


def predicted_speed(config: Config) -> float:
    """Tokens per second and GPU that the planner predicts; 0.0 for a layout that cannot run or does not fit.

    For searches that maximise it: nothing is trained. Raises ConfigError if no GPU is named.
    """
    from trainer.estimate.estimate import planned_machine
    from trainer.estimate.search.search import speed_of

    config = _checked(config)
    return speed_of(config, planned_machine(config, find_machine({})))


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Result:
    """Train in this process: alone, or as one rank of a launcher.

    callbacks: called on this rank, before those of `train.callbacks`.
    Raises CookbookError for mistakes and for a run that fails; exceptions of a callback pass through.
    """
    config = _checked(config)
    if config.dry_run:
        raise ConfigError("dry_run=true: train trains; use plan(config)")
    with _alone("train"):
        return _train(config, callbacks)


def _train(config: Config, callbacks: Sequence[Callback]) -> Result:
    from trainer.__main__ import start

    if config.train.run_dir is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("train.run_dir=null: every rank needs the same folder; name it")
        from trainer.report.folder import default_run_dir

        config.train.run_dir = str(default_run_dir(config, datetime.now()).absolute())
    return Result(Path(config.train.run_dir).expanduser(), start(config, callbacks))


def launch(*overrides: str, config_dir: str | Path | None = None) -> Result:
    """Start the ranks of a run on this machine, wait for them, and restart them where that helps.

    It prints the same as `python -m launch`. Raises CookbookError before anything is started; a run that fails
    afterwards returns a Result with its exit code.
    """
    from launch.__main__ import launch as start

    typed = settled(settle_clock(overrides, datetime.now()))
    folder = str(config_dir) if config_dir else None
    config = load_config(typed, config_dir=folder)
    if config.cluster.nodes > 1 or str(config.cluster.kind) != "local" or config.dry_run:
        raise ConfigError(
            f"cluster.kind={config.cluster.kind}, cluster.nodes={config.cluster.nodes}, dry_run={config.dry_run}:"
            " launch waits for a run on this machine; use python -m launch for others"
        )
    if config.train.run_dir is None:
        from trainer.report.folder import default_run_dir

        config.train.run_dir = str(default_run_dir(config, datetime.now()).absolute())
        typed.append(f"train.run_dir={quote_value(config.train.run_dir)}")
    with _alone("launch"):
        code, _ = start(typed, config_dir=folder, stay=True)
    return Result(Path(config.train.run_dir).expanduser(), code)


_RUNNING = Lock()


@contextmanager
def _alone(function: str) -> Generator[None]:
    """A run owns the process: its process group and random numbers, or its signals and all its children. Raises
    ConfigError while another run is under way in another thread, or in a callback."""
    if not _RUNNING.acquire(blocking=False):
        raise ConfigError(
            f"{function}: another run is under way in this process, and they would end each other's ranks; wait for it,"
            " or start this one in a process of its own"
        )
    try:
        yield
    finally:
        _RUNNING.release()


def _checked(config: Config) -> Config:
    """A copy with every value checked again, since fields may have been set. A Path is accepted for a text. Raises
    ConfigError."""
    given = deepcopy(config)
    for key in schema_keys():
        set_value(given, key, _text(value_at(given, key)))
    try:
        checked = from_yaml(to_yaml(given), where="the configuration")
    except OmegaConfBaseException as error:  # an object that no file can hold, such as a NumPy number
        raise ConfigError(explain(error)) from None
    if problems := [*check_ranges(checked)]:
        raise ConfigError(*problems)
    return checked


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(each) for each in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _text(each) for name, each in cast("dict[Any, Any]", value).items()}
    return str(value) if isinstance(value, Path) else value
