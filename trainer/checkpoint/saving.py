"""One save: take the state, write it, commit it.

    take      every rank gathers tensor after tensor and keeps those it is to write            all ranks, a collective
    write     safetensors files into .step-N.partial, each flushed and hashed                  each rank for itself
    commit    all ranks have written? state.json, tokenizer, manifest, rename                  all ranks, a collective

With `checkpoint.async_save` a thread does the writing, from copies, while training continues. It does not communicate:
the commit waits for a step boundary at which every rank's thread has finished. Collectives of two threads on one
process group would wait for each other for ever.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.errors import CheckpointFailed
from trainer.checkpoint.catalog import commit
from trainer.checkpoint.manifest import GENERATION, STATE, TOKENIZER, FileEntry, Manifest, entry_of, write_manifest
from trainer.checkpoint.progress import Progress, to_json
from trainer.checkpoint.tensors import RankWriter
from trainer.engine.saved import BUFFER
from trainer.process.disks import FULL, as_os_error, free_bytes, mib, out_of_inodes
from trainer.process.files import sync, write_synced
from trainer.process.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One rank's report to the others. error: of the disk; None if there was none."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    error: OSError | None = None


class Save:
    """A save from its first file to its commit. Every rank has one. kinds: as `Engine.kinds`."""

    def __init__(
        self, partial: Path, progress: Progress, runtime: Runtime, kinds: Mapping[str, frozenset[str]]
    ) -> None:
        self.partial, self.progress = partial, progress
        self._runtime, self._kinds = runtime, kinds
        self._writer = RankWriter(partial, runtime.rank)
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Make the folder. A collective. Raises CheckpointFailed on every rank."""

        def make() -> None:
            if self._runtime.is_main:
                with self._refusals(0):
                    shutil.rmtree(self.partial, ignore_errors=True)
                    self.partial.mkdir(parents=True)

        self._runtime.agree(make)

    def write(self, state: Iterable[tuple[str, torch.Tensor | None]]) -> None:
        """Gather and write, and return when this rank's files are on the disk. A collective, even if the disk fails:
        then this rank still takes part to the end, and `commit` reports the error."""
        for key, tensor in state:
            if tensor is not None:
                self._writer.add(key, tensor.cpu())
        self._writer.flush()

    def write_aside(self, state: Iterable[tuple[str, torch.Tensor | None]]) -> None:
        """Gather into host memory, and leave the writing to a thread. A collective."""
        copies = [(key, torch.empty_like(t, device="cpu").copy_(t)) for key, t in state if t is not None]

        def write() -> None:
            try:
                while copies:
                    # Removed from the list: written tensors release their memory.
                    self._writer.add(*copies.pop(0))
                self._writer.flush()
            except Exception as error:  # it would end this thread unseen, and the commit would find files missing
                self._writer.error = as_os_error(error) or OSError(0, repr(error))

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether this rank's files are on the disk, or never will be."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self, tokenizer: PreTrainedTokenizerBase, generation: bytes | None = None) -> tuple[Path, int]:
        """Make it a checkpoint. Returns its folder and size in bytes. A collective; waits for the writing.

        Raises CheckpointFailed on every rank if any of them could not write; then nothing of the save is left.
        """
        if self._thread is not None:
            self._thread.join()
        writer = self._writer
        mine = Written(files=writer.files, tensors=writer.tensors, bytes=writer.bytes, error=writer.error)
        parts = self._runtime.gather(mine)
        size = sum(part.bytes for part in parts)

        def finish() -> str:
            if not self._runtime.is_main:
                return ""
            with self._refusals(size):
                for part in parts:
                    if part.error is not None:
                        raise part.error
                return str(self._finish(parts, tokenizer, generation))

        return Path(self._runtime.broadcast(self._runtime.agree(finish))), size

    def _finish(self, parts: list[Written], tokenizer: PreTrainedTokenizerBase, generation: bytes | None) -> Path:
        tokenizer.save_pretrained(self.partial / TOKENIZER)
        if generation is not None:
            (self.partial / TOKENIZER / GENERATION).write_bytes(generation)
        for path in (self.partial / TOKENIZER).iterdir():
            sync(path)
        sync(self.partial / TOKENIZER)
        write_synced(self.partial / STATE, to_json(self.progress))
        others = [STATE, *(f"{TOKENIZER}/{path.name}" for path in (self.partial / TOKENIZER).iterdir())]
        tensors = _union(part.tensors for part in parts)
        _check_complete(tensors, self._kinds)
        manifest = Manifest(
            step=self.progress.step,
            files=_union(part.files for part in parts) | {name: entry_of(self.partial / name) for name in others},
            tensors=tensors,
        )
        write_manifest(self.partial, manifest)
        sync(self.partial)
        return commit(self.partial)

    @contextmanager
    def _refusals(self, size: int) -> Iterator[None]:
        """Raise CheckpointFailed if the disk refuses, and delete the partial save."""
        try:
            yield
        except Exception as error:
            refusal = as_os_error(error)
            if refusal is None:
                raise
            problem = self._explain(refusal, size)  # while the written files still take their space
            shutil.rmtree(self.partial, ignore_errors=True)
            raise CheckpointFailed(problem) from None

    def _explain(self, error: OSError, size: int) -> str:
        what = f"checkpoint of step {self.progress.step}"
        folder = self.partial.parent
        if error.errno in FULL:
            lack = "no inodes for it in" if out_of_inodes(folder) else "no space for it in"
            return (
                f"{what}: {lack} {folder}: needs {mib(size)}, has {mib(free_bytes(folder))}"
                f" ({error.strerror}); free some, lower checkpoint.keep_last, or choose another train.run_dir"
            )
        return (
            f"{what}: cannot be written to {folder} ({error.strerror or error}); make it writable, or choose another"
            " train.run_dir"
        )


def _check_complete(tensors: Iterable[str], kinds: Mapping[str, frozenset[str]]) -> None:
    """After the first update every trained parameter has optimizer states: a layout that returns only some of them
    would resume with the rest at zero, and no loss would show it at once."""
    names: dict[str, set[str]] = {}
    for key in tensors:
        kind, _, name = key.partition("/")
        names.setdefault(kind, set()).add(name)
    states = names.keys() - {"model", "frozen", "rng", BUFFER}
    if names["model"] != kinds.keys():
        raise AssertionError(f"model is there for {len(names['model'])} of {len(kinds)} parameters")
    for kind in states | {kind for found in kinds.values() for kind in found if states}:
        wanted = {name for name, found in kinds.items() if kind in found}
        if names.get(kind, set()) != wanted:
            raise AssertionError(f"{kind} is there for {len(names.get(kind, ()))} of {len(wanted)} parameters")


def _union(parts: Iterable[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}
