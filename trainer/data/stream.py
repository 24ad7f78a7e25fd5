"""A data set on the hub (or a local folder in its formats), read as it arrives: shuffled, tokenised, packed on the fly.

Sample p is the p-th window of one endless row of tokens: the stream's documents in the order of the shuffle
buffer, epoch after epoch, each epoch shuffled anew. Every rank walks the same stream and keeps its own windows.
That makes a step the same under any layout, and it has a price: each rank reads and tokenises everything, so the
run as a whole is as fast as one process can tokenise (about half a million tokens per second and core), and a run
that resumes reads again what came before. Where that is too slow, or the data is read more than once,
download it and use data=files, which tokenises it into the cache.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset as TorchIterableDataset

from configs.errors import DataError, first_line
from configs.schema import Data
from trainer.data import Batch
from trainer.data.cache import both_sides
from trainer.data.documents import Piece, content_hash, text_of
from trainer.data.encoding import encode_documents
from trainer.data.paths import files_inside, why_not_readable
from trainer.data.positions import Share, key_of, permute
from trainer.data.samples import make_batch
from trainer.data.tokenizer import Encoder

if TYPE_CHECKING:
    from datasets import IterableDataset

# Smaller than for files: the first step waits until so much text has arrived.
BULK_CHARACTERS = 2**16


def open_stream(data: Data, *, split: str) -> IterableDataset:
    """One split as a stream. Raises DataError if data set, subset or split cannot be reached or do not exist."""
    import datasets

    assert data.name is not None
    local = Path(os.path.expanduser(data.name))
    if local.exists() and data.revision is not None:
        raise DataError(
            f"data.revision={data.revision}: data.name={data.name} is a local folder, without revisions; set it to null"
        )
    _check_folder(data.name, local)
    # What fails is raised as well, and then said in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(
            str(local) if local.exists() else data.name,
            data.subset,
            split=split,
            revision=data.revision,
            streaming=True,
        )
    # The libraries below raise their own errors, those of HTTP, of the file system, and ValueError.
    except Exception as error:
        raise DataError(
            f"data.name={data.name}: split {split}{f' of subset {data.subset}' if data.subset else ''} cannot be"
            f" opened ({first_line(error)}); check data.name, data.subset, the split, and the network"
        ) from None


def _check_folder(name: str, folder: Path) -> None:
    """Raise DataError for what the library would wait for, or pass over."""
    try:
        files = files_inside(folder) if folder.is_dir() else []
        problems = [f"data.name={name}: {why}" for file in files if (why := why_not_readable(file))]
    except OSError as error:
        raise DataError(f"data.name={name}: cannot be looked up ({error.strerror}: {error.filename})") from None
    if problems:
        raise DataError(*problems)


@dataclass(frozen=True, kw_only=True)
class TextStream:
    """The texts of one split. rows: what `datasets` streams.

    `datasets` can shuffle a stream itself, but in another order inside a loader process than outside, and in
    another one in each of its versions. A run has to go on the same after both have changed.
    """

    rows: IterableDataset
    data: Data
    split: str

    def texts(self, files: Iterable[int] | None = None) -> Iterator[str]:
        """One pass over all texts that are not empty. files: the order of the data set's files, else as they stand."""
        count = self.rows.num_shards
        for file in files if files is not None else range(count):
            rows: Iterator[dict[str, Any]] = iter(self.rows.shard(num_shards=count, index=file))
            for number in count_from():
                where = f"data.name={self.data.name}: split {self.split}, file {file + 1} of {count}, row {number}"
                try:
                    row = next(rows, None)
                except Exception as error:
                    raise DataError(f"{where} cannot be read ({first_line(error)})") from None
                if row is None:
                    break
                if text := text_of(row, self.data.text_key, where=where):
                    yield text

    def epoch(self, number: int, *, seed: int, threshold: int) -> Iterator[str]:
        """The texts to train on in one epoch, in its order. threshold: text with a lower content hash is left out."""
        key, count = key_of(seed, number), self.rows.num_shards
        files = permute(np.arange(count), count=count, key=key).tolist() if self.data.shuffle else None
        texts = (text for text in self.texts(files) if content_hash(text) >= threshold)
        return shuffle_in_buffer(texts, size=self.data.shuffle_buffer, key=key) if self.data.shuffle else texts


def shuffle_in_buffer(texts: Iterable[str], *, size: int, key: int) -> Iterator[str]:
    """Hold `size` texts, and give out one of them, drawn at random, for each that arrives."""
    draw, buffer = random.Random(key), []
    for text in texts:
        if len(buffer) < size:
            buffer.append(text)
            continue
        # Of Python's random numbers, `random()` alone is promised to stay the same.
        place = int(draw.random() * size)
        yield buffer[place]
        buffer[place] = text
    yield from (buffer[place] for place in permute(np.arange(len(buffer)), count=len(buffer), key=key))


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Validation text: its tokens, and the threshold of the content hash below which training leaves text out."""

    tokens: NDArray[np.int64]
    threshold: int


def hold_out(stream: TextStream, encoder: Encoder, *, fraction: float, tokens: int) -> HeldOut:
    """Take `tokens` of validation text (fewer if the stream ends) out of a stream that is trained on."""
    threshold = int(fraction * 2**64)
    hashes: list[int] = []

    def chosen() -> Iterator[str]:
        for text in stream.texts():
            hashes.append(content_hash(text))
            if hashes[-1] < threshold:
                yield text

    found = take(chosen(), encoder, tokens=tokens)
    if len(found) < tokens and threshold and hashes:
        # The stream has ended, so its lowest and highest hash are known: see that neither side is left empty.
        better = both_sides(threshold, min(hashes), max(hashes))
        if better != threshold:
            texts = (text for text in stream.texts() if content_hash(text) < better)
            return HeldOut(tokens=take(texts, encoder, tokens=tokens), threshold=better)
    return HeldOut(tokens=found, threshold=threshold)


def take(texts: Iterable[str], encoder: Encoder, *, tokens: int) -> NDArray[np.int64]:
    """The first `tokens` tokens of these texts, each begun and ended as a document."""
    rows, missing = [np.empty(0, np.int64)], tokens
    arriving = _tokens(texts, encoder)
    while missing > 0 and (row := next(arriving, None)) is not None:
        rows.append(row)
        missing -= len(row)
    return np.concatenate(rows)[:tokens]


def _tokens(texts: Iterable[str], encoder: Encoder) -> Iterator[NDArray[np.int64]]:
    documents = ((None, Piece(text, last=True)) for text in texts)
    for _, _, ids in encode_documents(documents, encoder, characters=BULK_CHARACTERS):
        yield np.concatenate([np.array(encoder.begin, np.int64), ids, [encoder.end]])


@dataclass(frozen=True, kw_only=True)
class StreamedBatches(TorchIterableDataset[Batch | DataError]):
    """One rank's micro-batches from `first_step` on. Endless. seed, threshold: as for `TextStream.epoch`.

    A DataError is the last item instead of an exception: a loader process would turn it into a traceback.
    """

    stream: TextStream
    encoder: Encoder
    share: Share
    seed: int
    threshold: int
    first_step: int

    def __iter__(self) -> Iterator[Batch | DataError]:
        rows: list[NDArray[np.int64]] = []
        try:
            for window in self._windows():
                rows.append(window)
                if len(rows) == self.share.batch.micro_batch_size:
                    end = self.encoder.end if self.stream.data.document_mask else None
                    yield make_batch(np.stack(rows), end=end)
                    rows = []
        except DataError as error:
            yield error

    def _windows(self) -> Iterator[NDArray[np.int64]]:
        """This rank's windows of seq_len + 1 tokens; the rest of an epoch goes on into the next."""
        seq_len, position = self.share.batch.seq_len, 0
        first = self.first_step * self.share.batch.global_batch_size
        left = np.empty(0, np.int64)
        for row in self._rows():
            left = np.concatenate([left, row])
            start = 0
            while len(left) - start > seq_len:
                if position >= first and self.share.owns(position):
                    yield left[start : start + seq_len + 1]
                start, position = start + seq_len, position + 1
            left = left[start:]

    def _rows(self) -> Iterator[NDArray[np.int64]]:
        """The tokens of one document after the other, epoch after epoch."""
        for epoch in count_from():
            empty = True
            for row in _tokens(self.stream.epoch(epoch, seed=self.seed, threshold=self.threshold), self.encoder):
                empty = False
                yield row
            if empty:
                raise DataError(
                    f"data.name={self.stream.data.name}: split {self.stream.split} holds no text to train on;"
                    " choose another split, or set data.validation_fraction=0"
                )
