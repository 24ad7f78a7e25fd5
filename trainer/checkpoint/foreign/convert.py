"""Makes a checkpoint folder of ours from a source, one tensor in memory at a time. The caller commits it."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.errors import CheckpointMismatch, EnvironmentProblem
from configs.schema import Config
from trainer import linear
from trainer.checkpoint.catalog import partial_of
from trainer.checkpoint.foreign.source import MODEL, Record, Source
from trainer.checkpoint.manifest import GENERATION, STATE, TOKENIZER, Manifest, entry_of, write_manifest
from trainer.checkpoint.progress import Progress, model_identity, to_json
from trainer.checkpoint.tensors import RankWriter
from trainer.engine import Counters
from trainer.model.stored import some
from trainer.optim import table
from trainer.process.disks import free_bytes, mib, refused
from trainer.process.files import sync, write_synced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")


def convert(
    source: Source,
    target: Path,
    progress: Progress,
    *,
    place: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[str]:
    """Write a source as `partial_of(target)`, completely or not at all; `catalog.commit` makes it the checkpoint.
    Yields each key before its tensor is read, so that the caller can report progress.

    progress: from `progress_of`. place: the source's folder, for messages. tokenizer: of the run; None: the source's
    own files. Raises CheckpointMismatch, CheckpointDamaged, or EnvironmentProblem for a disk without the room.
    """
    keys = source.names()
    _check_complete(keys, place)
    needed = 4 * sum(prod(source.shape(key)) for key in keys)
    if needed > (free := free_bytes(target.parent)):
        raise EnvironmentProblem(
            f"{target}: {place} as a checkpoint of this trainer needs {mib(needed)}, has {mib(free)}; make room"
            " there, or choose another folder"
        )
    partial = partial_of(target)
    with _written(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        writer = RankWriter(partial, rank=0)
        for key in keys:
            yield key
            value = source.read(key)
            writer.add(key, value if value.dtype is torch.float64 else value.float())
            if writer.error is not None:
                raise writer.error
        writer.flush()
        if writer.error is not None:
            raise writer.error
        _finish(source, partial, writer, tokenizer, progress)


@contextmanager
def _written(partial: Path, target: Path) -> Iterator[None]:
    try:
        with refused(
            target.parent,
            lambda why: EnvironmentProblem(f"{target}: cannot be written ({why}); make room, or choose another folder"),
        ):
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def progress_of(record: Record, samples: int = 0) -> Progress:
    """The identity that a resuming run compares with. samples: the position in the data if the source gives none."""
    known: dict[str, Any] = model_identity(record.config) if record.config is not None else {}
    return Progress(
        step=record.step,
        samples=samples if record.samples is None else record.samples,
        engine=Counters(
            optimizer_steps=record.optimizer_steps, loss_scale=record.loss_scale, good_steps=record.good_steps
        ),
        # One optimizer for all parameters, all of them trained, and no average of the weights.
        identity={
            **known,
            **table.identity(table.plain(record.optimizer)),
            **(record.adapters or linear.identity(Config())),
        },
        layout={},
        origin={"kind": record.kind, "settings": json.loads(json.dumps(dict(record.settings)))}
        | ({} if record.next_lr is None else {"next_lr": record.next_lr}),
    )


def _finish(
    source: Source, partial: Path, writer: RankWriter, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> None:
    folder, theirs = partial / TOKENIZER, source.record.tokenizer
    folder.mkdir()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif theirs is not None:
        for pattern in (*TOKENIZER_FILES, GENERATION):
            for file in theirs.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    write_synced(partial / STATE, to_json(progress))
    others = [STATE, *(f"{TOKENIZER}/{file.name}" for file in folder.iterdir())]
    files = writer.files | {name: entry_of(partial / name) for name in others}
    write_manifest(partial, Manifest(step=progress.step, files=files, tensors=writer.tensors))
    sync(partial)


def _check_complete(keys: list[str], place: Path) -> None:
    """Every parameter must have the same states: the others would silently continue with moments of zero."""
    names: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        kind, _, name = key.partition("/")
        names[kind].add(name)
    problems = [
        f"{place}: has {kind} of {len(found)} of its {len(names[MODEL])} parameters ({some(sorted(differing))}); a"
        " checkpoint in which some of them are frozen, or that lacks a part, cannot be continued"
        for kind, found in names.items()
        if (differing := found ^ names[MODEL])
    ]
    if problems:
        raise CheckpointMismatch(*problems)
