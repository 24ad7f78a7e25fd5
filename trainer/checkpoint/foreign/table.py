"""The kinds of foreign checkpoints, and how a folder's kind is found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from configs.errors import CheckpointMismatch
from trainer.checkpoint.catalog import CHECKPOINTS, committed
from trainer.checkpoint.foreign import deepspeed, fsdp, hf_trainer
from trainer.checkpoint.foreign.source import Source
from trainer.checkpoint.manifest import STATE
from trainer.process.disks import readable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Kind(Protocol):
    """A module of this folder. NAMES: its formats, for the message about a folder of no kind."""

    @property
    def NAMES(self) -> str: ...

    def recognises(self, folder: Path) -> bool: ...

    def open_source(self, folder: Path, config: PretrainedConfig | None) -> Source:
        """config: of the resuming model, if known. Raises CookbookError, one line for each problem, for a checkpoint
        that is damaged or cannot be continued."""
        ...


KINDS: Sequence[Kind] = (fsdp, hf_trainer, deepspeed)
"""In the order of the checks: a folder may hold files of several."""

_NUMBERED = re.compile(r"(?:checkpoint|step)-(\d+)")


def recognise(folder: Path) -> tuple[Kind, Path] | None:
    """The kind of a folder, and the folder: itself, or its newest `checkpoint-N` or `step-N`."""
    with readable(folder):
        numbered = [(int(match[1]), path) for path in _folders(folder) if (match := _NUMBERED.fullmatch(path.name))]
        for candidate in (folder, *(path for _, path in sorted(numbered, reverse=True))):
            for kind in KINDS:
                if kind.recognises(candidate):
                    return kind, candidate
    return None


def open_foreign(folder: Path, config: PretrainedConfig | None = None) -> tuple[Path, Source]:
    """The folder of the checkpoint, and its content. Raises CheckpointMismatch for a folder of no known kind."""
    found = recognise(folder)
    if found is None:
        with readable(folder):
            there = folder.is_dir()
            ours = committed(folder / CHECKPOINTS) or committed(folder) or (folder / STATE).is_file()
        if ours:
            raise CheckpointMismatch(f"{folder}: is of this trainer already; go on from it with train.resume={folder}")
        why = "is no checkpoint of a kind that can be imported" if there else "there is no such folder"
        raise CheckpointMismatch(f"{folder}: {why}; give {known()}")
    kind, place = found
    return place, kind.open_source(place, config)


def known() -> str:
    return ", ".join(kind.NAMES for kind in KINDS)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
