"""Reading of a data set on the hub (or a local folder in its formats): its files, its rows, the held-out part.

Next: `windows`, which shuffles, tokenises and packs the texts on the fly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError, first_line
from configs.schema import Data
from trainer.data.documents import Piece, both_sides, content_hash, text_of
from trainer.data.encoding import encode_documents
from trainer.data.paths import files_inside, why_not_readable
from trainer.data.positions import key_of, permute
from trainer.data.tokenizer import Encoder

if TYPE_CHECKING:
    from datasets import IterableDataset

T = TypeVar("T")

# Smaller than for files: the first step waits until this much text has arrived.
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
    # Failures are raised as well, and then reported in one line.
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
    """Raise DataError for cases in which the library would wait, or skip rows."""
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

    `datasets` can shuffle a stream itself, but in another order inside a loader process than outside, and in another
    one in each of its versions. A run must continue identically after both have changed.
    """

    rows: IterableDataset
    data: Data
    split: str

    def texts(self) -> Iterator[str]:
        """One pass over all non-empty texts, in their order."""
        for file in range(self.rows.num_shards):
            for text, _ in self.file(file):
                if text:
                    yield text

    def file(self, number: int, start: FilePlace | None = None) -> Iterator[tuple[str, Callable[[], FilePlace]]]:
        """The texts of one file, including empty ones, each with the position after it. start: a position in it."""
        import datasets

        count = self.rows.num_shards
        shard = self.rows.shard(num_shards=count, index=number)
        begin, version = start or FilePlace(), datasets.__version__
        skipped = False
        if begin.state is not None and begin.version == version:
            shard.load_state_dict(begin.state)
        elif begin.row:
            # A version of the library does not read the state of another one.
            shard, skipped = shard.skip(begin.row), True

        def after() -> FilePlace:
            return FilePlace(row=read, state=None if skipped else shard.state_dict(), version=version)

        rows: Iterator[dict[str, Any]] = iter(shard)
        for read in count_from(begin.row + 1):
            where = f"data.name={self.data.name}: split {self.split}, file {number + 1} of {count}, row {read - 1}"
            try:
                row = next(rows, None)
            except Exception as error:
                raise DataError(f"{where} cannot be read ({first_line(error)})") from None
            if row is None:
                return
            yield text_of(row, self.data.text_key, where=where), after

    def order(self, epoch: int, *, seed: int) -> list[int]:
        """The files of an epoch."""
        count = self.rows.num_shards
        files = np.arange(count)
        return (permute(files, count=count, key=key_of(seed, epoch)) if self.data.shuffle else files).tolist()


class FilePlace(NamedTuple):
    """A position in a file. row: rows before it. state: data with which `datasets` resumes there. version: of
    `datasets`."""

    row: int = 0
    state: Any = None
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Validation text: its tokens, and the threshold of the content hash below which training skips text."""

    tokens: NDArray[np.int64]
    threshold: int


def hold_out(stream: TextStream, encoder: Encoder, *, fraction: float, tokens: int) -> HeldOut:
    """Take `tokens` of validation text (fewer if the stream ends) out of a training stream."""
    threshold = int(fraction * 2**64)
    hashes: list[int] = []

    def chosen() -> Iterator[str]:
        for text in stream.texts():
            hashes.append(content_hash(text))
            if hashes[-1] < threshold:
                yield text

    found = take(chosen(), encoder, tokens=tokens)
    if len(found) < tokens and threshold and hashes:
        # The stream has ended, so its lowest and highest hash are known: check that neither side is empty.
        better = both_sides(threshold, min(hashes), max(hashes))
        if better != threshold:
            texts = (text for text in stream.texts() if content_hash(text) < better)
            return HeldOut(tokens=take(texts, encoder, tokens=tokens), threshold=better)
    return HeldOut(tokens=found, threshold=threshold)


def take(texts: Iterable[str], encoder: Encoder, *, tokens: int) -> NDArray[np.int64]:
    """The first `tokens` tokens of these texts, each begun and ended as a document."""
    rows, missing = [np.empty(0, np.int64)], tokens
    arriving = tokens_of(((None, text) for text in texts), encoder)
    while missing > 0 and (row := next(arriving, None)) is not None:
        rows.append(row[1])
        missing -= len(row[1])
    return np.concatenate(rows)[:tokens]


def tokens_of(texts: Iterable[tuple[T, str]], encoder: Encoder) -> Iterator[tuple[T, NDArray[np.int64]]]:
    """Each text with its tokens, begun and ended as a document."""
    documents = ((tag, Piece(text, last=True)) for tag, text in texts)
    for tag, _, ids in encode_documents(documents, encoder, characters=BULK_CHARACTERS):
        yield tag, np.concatenate([np.array(encoder.begin, np.int64), ids, [encoder.end]])
