"""The data of a run as the loop sees it: batches per step, read ahead by loader processes where asked for.

A loader process draws no random numbers and decides nothing: it turns positions into batches. So the number of
them changes the speed of a run and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from configs.errors import DataError, RankProblem
from trainer.data import IGNORED, Batch
from trainer.data.positions import Order, Share, permute
from trainer.data.samples import Samples
from trainer.data.workers import no_room, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_KEY = 0x5EED
"""Validation samples are drawn with this key under every `train.seed`: runs that differ in the seed stay comparable."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True, kw_only=True)
class OrderedSamples(TorchDataset[Batch]):
    """Positions of the run to batches."""

    samples: Samples
    order: Order | None

    def __getitem__(self, positions: range) -> Batch:
        numbers = np.arange(positions.start, positions.stop, dtype=np.int64)
        return self.samples.read(self.order(numbers) if self.order else numbers)


@dataclass(frozen=True, kw_only=True)
class RankData:
    """`DataSet` of one data-parallel rank. micro_batches: endless from a step on. fingerprint: equal on all ranks
    whose data is equal. text: the line that `describe` gives."""

    tokenizer: PreTrainedTokenizerBase
    micro_batches: Callable[[int], Iterable[Batch | DataError]]
    validation_samples: Samples | None
    eval_samples: int
    share: Share
    fingerprint: str
    text: str

    def steps(self, first_step: int = 0) -> Iterator[list[Batch]]:
        with signals_held_back():
            try:
                micro_batches = iter(self.micro_batches(first_step))
            except OSError as error:
                # Its queues, too, need room in shared memory.
                raise RankProblem(*no_room(error).problems) from None
        while True:
            step = []
            for _ in range(self.share.batch.gradient_accumulation_steps):
                batch = next_item(micro_batches)
                if isinstance(batch, DataError):
                    # A stream can break off for one rank alone, which must then say so itself.
                    raise RankProblem(*batch.problems)
                step.append(batch)
            yield step

    def validation(self) -> Iterator[Batch]:
        if self.validation_samples is None:
            return
        available = self.validation_samples.count
        wanted = self.eval_samples if available is None else min(self.eval_samples, available)
        for positions in self.share.rounds(wanted):
            places = np.arange(positions.start, positions.stop, dtype=np.int64)
            surplus = places >= wanted
            places[surplus] = 0
            if available is not None:
                places = permute(places, count=available, key=VALIDATION_KEY)
            batch = self.validation_samples.read(places)
            batch.labels[torch.from_numpy(surplus)] = IGNORED
            yield batch

    def describe(self) -> str:
        return self.text


def next_item(items: Iterator[Any]) -> Any:
    """The next one. Raises RuntimeError, as torch does elsewhere, where a loader process died while it handed one over:
    the broken connection that is seen here says nothing of it."""
    try:
        return next(items)
    except RuntimeError as error:
        if "Bus error" not in str(error):
            raise
        raise RankProblem(*no_room(error).problems) from None
    except (ConnectionError, EOFError) as error:
        # What a living loader process raised itself begins with "Caught".
        if not getattr(items, "_workers", None) or str(error).startswith("Caught"):
            raise
        raise RuntimeError("DataLoader worker died while it handed over a batch: killed, or out of memory") from error


def build_loader(
    dataset: TorchDataset[Any], *, sampler: Iterable[range] | None, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """A loader whose items are whole micro-batches. sampler: their positions; None for a stream, which knows them."""
    if num_workers:
        # The loader processes are forks. Tokenizer threads do not survive a fork, and would warn about it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=share if num_workers else _as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent if num_workers else None,
        # Otherwise the loader would draw a number from the generator that the model's dropout uses.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Start loader processes in here: they inherit the blocked signals, and none can hit them while they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """Launchers and terminals signal the whole process group. The trainer then finishes its step and saves, for
    which it needs its loader processes alive: they heed only the SIGTERM that the trainer itself sends at its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # A blocked signal can be fetched together with its sender.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else 0):
        pass
    os._exit(0)
