"""`python -m trainer.checkpoint import`: makes a folder of ours from a foreign checkpoint, and reports on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.errors import EnvironmentProblem
from configs.schema import Model
from trainer.checkpoint.catalog import commit, partial_of
from trainer.checkpoint.foreign.convert import convert, progress_of
from trainer.checkpoint.foreign.source import alone
from trainer.checkpoint.foreign.table import open_foreign
from trainer.model.build import build_hf_config
from trainer.process.disks import readable


def import_checkpoint(source: Path, target: Path, *, model: str | None = None) -> Iterator[str]:
    """Write `target`, and print in lines what was imported and what was not.

    model: folder or hub id, if the source has no config. Raises CookbookError.
    """
    with readable(target):
        exists = target.exists()
    if exists:
        raise EnvironmentProblem(f"{target}: exists; choose another folder")
    place, opened = open_foreign(source, build_hf_config(Model(path=model)) if model is not None else None)
    record = opened.record
    if record.adapters:
        raise alone(place)
    for _ in convert(opened, target, progress_of(record), place=place):
        pass
    commit(partial_of(target))
    yield f"{target}: {record.kind}, step {record.step}, from {place}; go on with train.resume={target}"
    for key, value in record.settings.items():
        yield f"    trained with {key}={value}"
    if record.next_lr is not None:
        yield f"    learning rate of step {record.step + 1}: {record.next_lr:.6g}"
    if record.samples is None:
        yield "    does not say how many samples it has seen: the data begin at their first sample"
    yield from (f"    {note}" for note in record.notes)
