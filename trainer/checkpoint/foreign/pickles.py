"""Files of torch.save, read by torch's own restricted unpickler: only tensors and plain values, nothing that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointDamaged, CheckpointMismatch, first_line
from trainer.checkpoint.foreign.inert import stand_ins
from trainer.process.disks import as_os_error, readable

_NAMED = re.compile(r"GLOBAL (\S+)")


def load(file: Path, known: tuple[str, ...] = ()) -> Any:
    """The content of the file; its tensors stay in the file until they are read. known: names of further objects that
    are allowed and replaced by stand-ins (`inert`).

    Raises CheckpointMismatch if it names anything but tensors and plain values, CheckpointDamaged if it is not a
    complete file of torch.save.
    """
    try:
        with readable(file), torch.serialization.safe_globals(stand_ins(known)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a truncated or foreign file can fail in any library
        if as_os_error(error) is not None:
            raise
        raise refusal(file, error) from None


def refusal(file: Path, error: Exception) -> CheckpointDamaged | CheckpointMismatch:
    """The line about a file that torch has not read."""
    said = str(error)
    if "mmap can only be used" in said:
        return CheckpointMismatch(
            f"{file}: is in the format of torch before 1.6; load and save it again with a newer torch"
        )
    if (named := _NAMED.search(said)) is not None:
        return CheckpointMismatch(
            f"{file}: a pickle that names {named[1]}, which is refused unread; only tensors and plain values are"
            " read: save it again without that"
        )
    return CheckpointDamaged(f"{file}: expected a whole file of torch.save, found {first_line(error)[:120]}")
