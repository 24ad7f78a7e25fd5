"""The run folder: its name, and the record of the run, written before the first step.

    config.yaml     the resolved configuration; `configs.load.from_yaml` reads it back
    plan.txt        the plan in words
    versions.json   Python, packages, device and driver
    git.json        commit and state of the project and of the working directory, where they are git checkouts;
                    git-NAME.diff holds what was changed and not committed
    argv.json       the command line
    resumed/002/    the same five files of the second start of this run, and so on

The environment is not recorded, because it holds keys; `private` protects other files. Torch-free at import, so that a
launcher can name the folder before any rank starts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError, EnvironmentProblem
from configs.keys import schema_keys, value_at
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from trainer.checkpoint.catalog import CHECKPOINTS, committed
from trainer.process.disks import readable, writing
from trainer.process.files import read_json
from trainer.process.private import write_private
from trainer.process.status import check_unfinished, lock, restarted_in
from trainer.report import provenance
from trainer.report.trackers import check_tracker_installed

if TYPE_CHECKING:
    import torch

    from trainer.plan.plan import Plan
    from trainer.process.runtime import Runtime

RUNS = Path("runs")
RUN_FILES = ("config.yaml", "plan.txt", "argv.json", "versions.json", "git.json", "metrics.jsonl", "summary.json")
"""Files that mark a run's folder; none of them is ever overwritten."""
RESUMED = "resumed"


def run_label(config: Config) -> str:
    """MODEL-LAYOUT-PRECISION, in letters, digits, dots, dashes and underscores."""
    model = Path(config.model.path).name if config.model.path else config.model.preset
    parts = (model, config.parallel.preset, config.precision.preset)
    # A name of a folder has 255 bytes at most.
    return "-".join(re.sub(r"[^\w.-]+", "_", part, flags=re.ASCII)[:60] or "_" for part in parts)


def default_run_dir(config: Config, now: datetime) -> Path:
    """runs/MODEL-LAYOUT-PRECISION/YYYYmmdd-HHMMSS, with -2, -3, ... where that folder exists already."""
    parent, stamp = RUNS / run_label(config), now.strftime("%Y%m%d-%H%M%S")
    names = (stamp if number == 1 else f"{stamp}-{number}" for number in count(1))
    return next(parent / name for name in names if not (parent / name).exists())


def claim_run_dir(config: Config, now: datetime) -> Path:
    """Create the run's folder and return its absolute path: `train.run_dir`, or one with the default name. From then on
    it belongs to this process alone.

    A folder with an unfinished run is returned, to continue it, unless `train.resume` is never. Raises
    EnvironmentProblem if it holds another run, if a run is under way in it, or if it cannot be written, RunFinished if
    its run has finished, and PlanError if more steps are requested that cannot follow.
    """
    named = config.train.run_dir
    earlier = Path(named).expanduser().absolute() if named is not None else _earlier_start(config)
    if earlier is not None:
        with writing(earlier):
            earlier.mkdir(parents=True, exist_ok=True)
            again = restarted_in(earlier)
            _check_free(config, earlier, again=again)
            lock(earlier)
            # Again: another start may have begun, and ended, before we got the lock.
            _check_free(config, earlier, again=again)
        _check_continuable(config, earlier)
        return earlier
    folder = make_run_dir(config, now).absolute()
    with writing(folder):
        lock(folder)
    return folder


def _earlier_start(config: Config) -> Path | None:
    """The folder that this job claimed under the default name before torchrun restarted it; None at a first start."""
    folders = (RUNS / run_label(config)).glob("*")
    return next((folder.absolute() for folder in sorted(folders, reverse=True) if restarted_in(folder)), None)


def make_run_dir(config: Config, now: datetime) -> Path:
    """Create a folder with the default name: two starts in the same second get one each.

    Raises EnvironmentProblem if it cannot be written.
    """
    while True:
        folder = default_run_dir(config, now)
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another run took the same name since we looked
                continue


def open_run_folder(config: Config, plan: Plan, runtime: Runtime, *, argv: Sequence[str] = sys.argv) -> Path:
    """Create the run folder and write the record of the run. Returns its absolute path on every rank. A collective.

    Raises as `claim_run_dir` on every rank, and EnvironmentProblem when the tracker is not installed; nothing is
    overwritten.
    """

    folder = runtime.agree(lambda: str(_open(config, plan, runtime.device, argv)) if runtime.is_main else "")
    return Path(runtime.broadcast(folder))


def _open(config: Config, plan: Plan, device: torch.device, argv: Sequence[str]) -> Path:
    check_tracker_installed(config.logging.tracker)
    folder = claim_run_dir(config, datetime.now())
    with writing(folder):
        record = _record_folder(folder)
        write_private(record / "config.yaml", to_yaml(config))
        _write_new(record / "plan.txt", plan.describe() + "\n")
        write_private(record / "argv.json", _json(list(argv)))
        _write_new(record / "versions.json", _json(provenance.versions(device)))
        write_private(record / "git.json", _json(provenance.git_state(record)))
    return folder


def set_end_aside(folder: Path, step: int) -> None:
    """Rename the model and the summary of an earlier end of a run that continues from `step`; its new end has others.

    It is called after the engine has loaded the checkpoint, so that a refused start leaves them in place. Raises
    EnvironmentProblem if the folder cannot be written.
    """
    with writing(folder):
        summary = folder / "summary.json"
        ended = read_json(summary).get("steps", step)
        for path in (folder / "model", summary):
            if path.exists():
                stem = f"{path.stem}-step-{ended}"
                names = (f"{stem}{'' if n == 1 else f'-{n}'}{path.suffix}" for n in count(1))
                path.rename(next(folder / name for name in names if not (folder / name).exists()))


def _record_folder(folder: Path) -> Path:
    """The folder of this start's record. If an earlier start ended before the first step, its record is overwritten,
    since nothing continues from it."""
    if not _has_begun(folder):
        for path in (*(folder / name for name in RUN_FILES), *folder.glob("git-*.diff")):
            path.unlink(missing_ok=True)
        return folder
    number = next(number for number in count(2) if not (folder / RESUMED / f"{number:03d}").exists())
    record = folder / RESUMED / f"{number:03d}"
    record.mkdir(parents=True)
    return record


def _check_free(config: Config, folder: Path, *, again: bool) -> None:
    """Raises EnvironmentProblem if the folder holds files that this run must not change."""
    if _is_record(folder) and (config.train.resume != "never" or again or not _has_begun(folder)):
        return
    taken = [name for name in RUN_FILES if (folder / name).exists()]
    if taken:
        raise EnvironmentProblem(
            f"train.run_dir={folder}: holds a run already ({taken[0]}); choose another folder,"
            " or leave train.run_dir out"
        )


def _is_record(folder: Path) -> bool:
    """Whether this config.yaml belongs to a run, not to somebody else."""
    path = folder / "config.yaml"
    if not path.is_file():
        return False
    try:
        with readable(path):
            from_yaml(path.read_text())
    except (UnicodeDecodeError, ConfigError):
        return False
    return True


def _has_begun(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or bool(committed(folder / CHECKPOINTS))


def _check_continuable(config: Config, folder: Path) -> None:
    """Raises RunFinished, PlanError or EnvironmentProblem unless the run in the folder is this one, with steps left to
    train."""
    check_unfinished(config, folder)
    if not (folder / "metrics.jsonl").exists() or committed(folder / CHECKPOINTS):
        # Either nothing to lose, or a checkpoint, which identifies its run better than config.yaml.
        return
    saved = from_yaml((folder / "config.yaml").read_text())
    for key in schema_keys():
        if key.startswith(("model.", "data.", "optimizer.", "scheduler.")):
            here, there = value_at(config, key), value_at(saved, key)
            if there != here:
                raise EnvironmentProblem(
                    f"train.run_dir={folder}: holds another run ({key}={there}, here {here}), which has no"
                    " checkpoint yet; choose another folder, or give the same value to start that run again"
                )


def _write_new(path: Path, text: str) -> None:
    """Mode x: an existing file is not ours to replace."""
    with open(path, "x") as file:
        file.write(text)


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
