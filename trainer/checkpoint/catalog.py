"""The checkpoints of one run: their names, the leftovers of a kill, and the choice of those to delete.

There is no `latest` file that could be torn, lost or ahead of the truth: the newest checkpoint is the committed folder
with the highest step. Names that begin with a dot are never checkpoints:

    .step-00000200.partial     being written
    .step-00000200.replaced    moved aside for the moment in which a new folder of that name takes its place
    .step-00000100.deleted     on its way out: hidden in one rename, then removed file by file
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.process.disks import readable
from trainer.process.files import rename_synced

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_COMMITTED = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced|deleted)")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def partial_folder(folder: Path, step: int) -> Path:
    return partial_of(folder / step_name(step))


def partial_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def final_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint after its commit; a committed one is unchanged."""
    return checkpoint.with_name(checkpoint.name.removeprefix(".").removesuffix(".partial"))


def committed(folder: Path) -> list[Path]:
    """Checkpoints below a run's `checkpoints` folder, oldest first. A name shows that a save was committed, not that
    its files are still intact. Raises EnvironmentProblem if the folder cannot be read."""
    names: list[str] = []
    with readable(folder), suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(folder)
    found = [(int(match[1]), folder / name) for name in names if (match := _COMMITTED.fullmatch(name))]
    return [path for _, path in sorted(found)]


def commit(partial: Path) -> Path:
    """Give a complete, flushed folder its name. If that name is taken, the old folder is deleted once the new one is in
    place; `tidy` restores it after a kill in between."""
    target = final_of(partial)
    old = partial.with_name(f".{target.name}.replaced")
    if target.exists():
        rename_synced(target, old)
    rename_synced(partial, target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def tidy(folder: Path) -> None:
    """Remove a killed run's unfinished work. Only for the holder of the run folder's lock."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match and match[2] == "replaced" and not (folder / match[1]).exists():
            rename_synced(path, folder / match[1])
        elif match:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts as one; it stays for inspection."""
    for number in range(1, 1000):
        target = checkpoint.with_name(f"{checkpoint.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            rename_synced(checkpoint, target)
            return target
    return checkpoint


def surplus(checkpoints: Sequence[Path], *, keep_last: int, keep_every: int, best: int | None = None) -> list[Path]:
    """The checkpoints to delete. checkpoints: oldest first. The newest `keep_last` stay, every step that `keep_every`
    divides (0: none), and the best one."""
    old = checkpoints[: max(0, len(checkpoints) - keep_last)]
    steps = [step_of(path) or 0 for path in old]
    return [
        p for p, step in zip(old, steps, strict=True) if not ((keep_every and step % keep_every == 0) or step == best)
    ]


def delete(checkpoint: Path) -> None:
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    rename_synced(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def step_of(checkpoint: Path) -> int | None:
    """The step in a committed checkpoint's name; None for a folder of another name."""
    match = _COMMITTED.fullmatch(checkpoint.name)
    return int(match[1]) if match else None
