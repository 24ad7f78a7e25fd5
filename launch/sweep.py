"""`python -m launch -m parallel=ddp,zero1`: runs one after another, folders named after their differences, a table.

    runs/tiny-sweep-fp32/20260101-120000/parallel=ddp
    runs/tiny-sweep-fp32/20260101-120000/parallel=zero1

The runs of a sweep share nothing else; `launch.compare` compares layouts with each other.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from configs.entry_point import Arguments, print_problems
from configs.errors import EXIT_FINISHED, ConfigError, CookbookError
from configs.load import expand_sweep, load_config
from configs.overrides import quote_value
from configs.schema import Config
from launch.clusters import elsewhere
from launch.comparison.table import aligned, outcome
from launch.jobs import is_array, launch_array
from launch.points import names
from trainer.report.folder import default_run_dir
from trainer.report.reading import Run, read_run

TITLES = ("run", "state", "last loss", "validation loss", "tokens/s", "peak memory", "folder")
FOLDER = "train.run_dir="


def sweep(arguments: Arguments, launch: Callable[..., tuple[int, bool]]) -> int:
    """A failure does not stop the others, a signal does. Returns the first failure's code.

    launch: that of `launch.__main__`.
    """
    runs = expand_sweep(arguments.overrides)
    configs = [_composed(run, arguments.config_dir) for run in runs]
    first = next(filter(None, configs), None) or load_config(runs[0], config_dir=arguments.config_dir)
    if is_array(first.cluster):
        return launch_array(runs, config_dir=arguments.config_dir)
    named = [config.train.run_dir if config is not None else None for config in configs]
    check_folders(named)
    other, labels = elsewhere(first.cluster.kind), names(runs, keys=True)
    here = other is None or other.WAITS
    apart = replace(first, parallel=replace(first.parallel, preset="sweep"))
    default = default_run_dir(apart, datetime.now())
    folders = [
        Path(given).expanduser() if given else default / label for given, label in zip(named, labels, strict=True)
    ]
    if here:
        runs = [
            [*run, f"{FOLDER}{quote_value(str(folder))}"] if config is not None and not config.train.run_dir else run
            for run, config, folder in zip(runs, configs, folders, strict=True)
        ]
    codes: list[int] = []
    found: list[Run] = []
    # For a run on several nodes without a cluster, the commands are printed.
    planned = first.dry_run or (other is None and first.cluster.nodes > 1)
    mark = "# " * first.dry_run  # the output may then be a file for a shell, or for kubectl
    for number, (overrides, label, folder) in enumerate(zip(runs, labels, folders, strict=True), 1):
        print(f"\n{mark}== run {number} of {len(runs)}: {shlex.join(overrides)}", flush=True)
        reason, stopped = None, False
        try:
            code, stopped = launch(overrides, config_dir=arguments.config_dir, stay=True)
        except CookbookError as error:
            code, reason = print_problems(error), error.problems[0]
        codes.append(code)
        if here and not planned:
            found.append(read_run(label, folder, reason or f"ended with exit code {code}"))
        if stopped:
            break
    if found:
        print(f"\n{aligned([TITLES, *(outcome(run) for run in found)])}")
        print(*(f"{run.name}: {run.problem}" for run in found if run.problem is not None), sep="\n")
    what = "runs finished" if here else "jobs submitted"
    what = "runs planned, none started" if planned else what
    print(f"\n{mark}== {codes.count(EXIT_FINISHED)} of {len(runs)} {what}")
    return next((code for code in codes if code != EXIT_FINISHED), EXIT_FINISHED)


def check_folders(named: Sequence[str | None]) -> None:
    """Raises ConfigError if two runs of a sweep would share a folder: the second would continue the first.

    named: `train.run_dir` of each run.
    """
    shared = next((folder for folder in named if folder is not None and named.count(folder) > 1), None)
    if shared is not None:
        raise ConfigError(
            f"{FOLDER}{shared}: {named.count(shared)} runs of the sweep would share this folder; leave it out, and each"
            " gets its own; on SLURM, cluster.slurm.array=%4 makes a folder for each in it"
        )


def _composed(overrides: Sequence[str], config_dir: str | None) -> Config | None:
    """None if it is refused; `launch` reports the reason later."""
    try:
        return load_config(overrides, config_dir=config_dir)
    except CookbookError:
        return None
