"""The data of a run as the loop sees it: batches per step, prefetched by loader processes if requested.

A loader process draws no random numbers and decides nothing: it turns positions into batches. So their number changes
the speed of a run and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from configs.errors import DataError, RankProblem
from trainer.data import IGNORED, Batch
from trainer.data.positions import Order, Share, permute
from trainer.data.samples import Samples
from trainer.data.workers import no_room, share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_KEY = 0x5EED
"""Key of the validation samples under every `train.seed`: runs with different seeds stay comparable."""

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


class Opened(Protocol):
    """The samples at positions of the run."""

    def at(self, positions: NDArray[np.int64]) -> Batch: ...

    def mark(self) -> Any:
        """JSON values from which the current position can be found again; None if that takes no search."""
        ...


class Reading(Protocol):
    """The samples by position of the run. Sent to loader processes, so its pickle must be small."""

    @property
    def in_order(self) -> bool:
        """Whether positions must be requested in increasing order, because earlier samples are read first."""
        ...

    def open(self, mark: Any = None) -> Opened:
        """Called in the process that reads. mark: from `Opened.mark`, at or before the first position."""
        ...


@dataclass(frozen=True, kw_only=True)
class OrderedSamples:
    """`Reading` of numbered samples, in any order and at once."""

    samples: Samples
    order: Order | None
    in_order: bool = False

    def open(self, mark: Any = None) -> OrderedSamples:
        return self

    def at(self, positions: NDArray[np.int64]) -> Batch:
        return self.samples.read(self.order(positions) if self.order else positions)

    def mark(self) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class _Anywhere(TorchDataset[Batch | DataError]):
    """Positions to batches, in any number of processes; a DataError as below."""

    opened: Opened

    def __getitem__(self, positions: range) -> Batch | DataError:
        try:
            return _numbered(self.opened, positions)
        except DataError as error:
            return error


@dataclass(frozen=True, kw_only=True)
class _OneAfterAnother(TorchIterableDataset[Batch | DataError]):
    """The micro-batches of one rank from `first_step` on, in one process. Endless.

    A DataError is the last item instead of an exception: a loader process would turn it into a traceback.
    """

    reading: Reading
    share: Share
    first_step: int
    mark: Any

    def __iter__(self) -> Iterator[Batch | DataError]:
        per_step = self.share.batch.gradient_accumulation_steps
        try:
            opened = self.reading.open(self.mark)
            for number, positions in enumerate(self.share.micro_batches(self.first_step)):
                mark = None if number % per_step else opened.mark()
                batch = _numbered(opened, positions)
                yield batch if mark is None else MarkedBatch(**batch.named, mark=mark)
        except DataError as error:
            yield error


def _numbered(opened: Opened, positions: range) -> Batch:
    numbers = np.arange(positions.start, positions.stop, dtype=np.int64)
    return replace(opened.at(numbers), numbers=torch.from_numpy(numbers))


@dataclass(frozen=True, slots=True)
class MarkedBatch(Batch):
    """The first micro-batch of a step, with its position in a stream."""

    mark: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The source of a run's samples, the same on every rank.

    count: samples per epoch; None if unknown. fingerprint: equal if the data is equal.
    text: one line about it, given the number of samples and steps that the run reads.
    parts: number of given positions in each source of a mixture.
    until_exhausted: positions before the first source is exhausted; None: never.
    """

    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    validation: Samples
    count: int | None
    fingerprint: str
    text: Callable[[int, int], str]
    parts: Callable[[range], Mapping[str, int]] = lambda _: {}
    until_exhausted: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RankData:
    """`DataSet` of one data-parallel rank. length: steps of the run. sets: of `data.validation_sets`."""

    source: Source
    sets: Mapping[str, Samples] = field(default_factory=dict)
    share: Share
    eval_samples: int
    length: int
    num_workers: int
    pin_memory: bool
    _marks: list[Any] = field(default_factory=list)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def describe(self) -> str:
        return self.source.text(self.length * self.share.batch.global_batch_size, self.length)

    def samples_of(self, positions: range) -> Mapping[str, int]:
        return self.source.parts(positions)

    def steps(self, first_step: int = 0, mark: Any = None) -> Iterator[list[Batch]]:
        with signals_held_back():
            try:
                micro_batches = iter(self._micro_batches(first_step, mark))
            except OSError as error:
                # Its queues need room in shared memory, too.
                raise RankProblem(*no_room(error).problems) from None
        while True:
            step = []
            for _ in range(self.share.batch.gradient_accumulation_steps):
                batch = next_item(micro_batches)
                if isinstance(batch, DataError):
                    # A stream can break off for one rank alone, which must then report it itself.
                    raise RankProblem(*batch.problems)
                step.append(batch)
            self._marks[:] = [batch.mark for batch in step if isinstance(batch, MarkedBatch)]
            yield step

    def mark(self) -> Any:
        return self._marks[0] if self._marks else None

    def _micro_batches(self, first_step: int, mark: Any) -> Iterable[Batch | DataError]:
        reading = self.source.reading
        if reading.in_order:
            whole = _OneAfterAnother(reading=reading, share=self.share, first_step=first_step, mark=mark)
            # A second process would read and tokenise the same stream again, without any benefit.
            workers = min(1, self.num_workers)
            return build_loader(whole, sampler=None, num_workers=workers, pin_memory=self.pin_memory)
        return build_loader(
            _Anywhere(opened=reading.open()),
            sampler=self.share.micro_batches(first_step),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    @property
    def validation_sets(self) -> Sequence[str]:
        return tuple(self.sets)

    def validation(self, name: str | None = None) -> Iterator[Batch]:
        samples = self.source.validation if name is None else self.sets[name]
        available = samples.count
        wanted = self.eval_samples if available is None else min(self.eval_samples, available)
        for positions in self.share.rounds(wanted):
            places = np.arange(positions.start, positions.stop, dtype=np.int64)
            surplus = places >= wanted
            places[surplus] = 0
            if available is not None:
                places = permute(places, count=available, key=VALIDATION_KEY)
            try:
                batch = samples.read(places)
            except DataError as error:
                raise RankProblem(*error.problems) from None
            batch.labels[torch.from_numpy(surplus)] = IGNORED
            yield batch

    def beginnings(self, count: int) -> Batch:
        samples = self.source.validation
        places = np.arange(count if samples.count is None else min(count, samples.count), dtype=np.int64)
        return samples.read(
            places if samples.count is None else permute(places, count=samples.count, key=VALIDATION_KEY)
        )


def next_item(items: Iterator[Any]) -> Any:
    """The next one. Raises RuntimeError, as torch does elsewhere, if a loader process died while it passed one on: the
    broken connection that is seen here does not show the cause."""
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
        # Otherwise the loader would draw a number from the generator of the model's dropout.
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
    """Launchers and terminals signal the whole process group. The trainer then finishes its step and saves, and needs
    its loader processes for that: they obey only the SIGTERM that the trainer itself sends at its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # A blocked signal can be fetched together with its sender.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (parent.pid if parent else 0):
        pass
    os._exit(0)
