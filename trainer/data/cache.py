"""Text is tokenised once, into files that every later run and every rank of the machine maps into memory.

    CACHE_DIR/KEY/train.bin         token ids, uint16 where they fit, else uint32
    CACHE_DIR/KEY/validation.bin    those of the pieces that are held out
    CACHE_DIR/KEY/meta.json         their numbers; its presence says that the entry is whole

KEY is a hash of everything that determines the content: paths, sizes and modification times of the files, tokenizer,
text field, held-out fraction. `entries` makes an entry complete.

A hash of the text itself decides which text is held out, piece by piece. So copies of a text fall on the same side, and
added text moves nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError, first_line
from trainer.data.documents import Piece, both_sides, content_hash, read_pieces
from trainer.data.encoding import encode_documents
from trainer.data.entries import META, cached, check_files, token_dtype
from trainer.data.samples import TokenFile
from trainer.data.split import Split
from trainer.data.tokenizer import Encoder

FORMAT = 1
PROGRESS_SECONDS = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Training and validation files; for conversations also splits of a data set. validation: empty if `fraction` of
    the text is held out instead."""

    training: tuple[Path | Split, ...]
    validation: tuple[Path | Split, ...]
    text_key: str
    fraction: float

    def key(self, encoder: Encoder) -> str:
        """Changes with everything that could change a token."""
        identity = {
            "format": FORMAT,
            "training": [_identity(path) for path in self.training],
            "validation": [_identity(path) for path in self.validation],
            "text_key": self.text_key,
            "fraction": self.fraction,
            "tokenizer": encoder.fingerprint,
            "end": encoder.end,
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def entries(self) -> Iterator[tuple[bool, Path | Split]]:
        """All of them, and whether each is to validate on."""
        for for_validation, entries in ((False, self.training), (True, self.validation)):
            yield from ((for_validation, entry) for entry in entries)


@contextmanager
def named(entry: Path | Split, *, for_validation: bool) -> Iterator[None]:
    """Problems of an entry are reported under the key that contains it."""
    try:
        yield
    except DataError as error:
        raise DataError(*(renamed(line, entry, for_validation=for_validation) for line in error.problems)) from None


def renamed(line: str, entry: Path | Split, *, for_validation: bool) -> str:
    """Readers of files know only `data.paths`."""
    if isinstance(entry, Split):
        return line.replace("data.paths: ", f"data.name={entry.data.name}: ", 1)
    return line.replace("data.paths: ", "data.validation_paths: ", 1) if for_validation else line


def _identity(path: Path | Split) -> tuple[Any, ...]:
    if isinstance(path, Split):
        return path.identity
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"data.paths: {path} cannot be read ({error.strerror or first_line(error)})") from None
    return str(path), status.st_size, status.st_mtime_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Content of meta.json. lowest, highest: of all content hashes. digest: of all tokens."""

    dtype: str
    documents: int
    skipped: int
    training_tokens: int
    validation_tokens: int
    lowest: int
    highest: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenisedText:
    counts: Counts
    training: TokenFile
    validation: TokenFile


class _Origin(NamedTuple):
    """Origin of a piece of text: a validation file or not; the end of a document or not."""

    for_validation: bool
    ends_document: bool


def load_tokens(corpus: Corpus, encoder: Encoder, *, cache_dir: str) -> TokenisedText:
    """The corpus as tokens: from the cache, or tokenised now if no process has done it before.

    Raises DataError for unreadable text, and for a cache folder that cannot be written.
    """
    return cached(cache_dir, corpus.key(encoder), build=lambda folder: _build(corpus, encoder, folder), read=_open)


def _open(folder: Path) -> TokenisedText:
    """Map a whole entry."""
    counts = Counts(**json.loads((folder / META).read_text()))
    width = np.dtype(counts.dtype).itemsize
    files = {"train.bin": counts.training_tokens, "validation.bin": counts.validation_tokens}
    check_files(folder, {name: tokens * width for name, tokens in files.items()})
    training, validation = (
        TokenFile(path=str(folder / name), dtype=counts.dtype, count=tokens) for name, tokens in files.items()
    )
    return TokenisedText(counts=counts, training=training, validation=validation)


def _build(corpus: Corpus, encoder: Encoder, folder: Path) -> None:
    threshold = 0 if corpus.validation else int(corpus.fraction * 2**64)
    counts = _tokenise(corpus, encoder, folder, threshold)
    if threshold and (better := both_sides(threshold, counts.lowest, counts.highest)) != threshold:
        counts = _tokenise(corpus, encoder, folder, better)
    (folder / META).write_text(json.dumps(asdict(counts)))


def _tokenise(corpus: Corpus, encoder: Encoder, folder: Path, threshold: int) -> Counts:
    """Write both token files. threshold: text with a content hash below it is held out."""
    dtype = token_dtype(encoder.vocabulary)
    documents, skipped, lowest, highest = 0, 0, 2**64, -1
    with (
        _Row(folder / "train.bin", dtype, encoder) as training,
        _Row(folder / "validation.bin", dtype, encoder) as validation,
    ):
        for origin, text, ids in encode_documents(_pieces(corpus), encoder):
            if not text:
                skipped += 1
                continue
            digest = content_hash(text)
            lowest, highest = min(lowest, digest), max(highest, digest)
            held_out = origin.for_validation or digest < threshold
            row, other = (validation, training) if held_out else (training, validation)
            # The file has switched between training and validation: its open document ends on this side.
            other.end_document()
            row.add(ids)
            if origin.ends_document:
                row.end_document()
                documents += 1
    return Counts(
        dtype=dtype,
        documents=documents,
        skipped=skipped,
        training_tokens=training.tokens,
        validation_tokens=validation.tokens,
        lowest=lowest,
        highest=highest,
        digest=hashlib.sha256((training.digest() + validation.digest()).encode()).hexdigest(),
    )


def _pieces(corpus: Corpus) -> Iterator[tuple[_Origin, Piece]]:
    """All text of the corpus in pieces. Reports progress now and then."""
    files = list(corpus.entries())
    sizes = {path: _identity(path)[1] for _, path in files}
    total = sum(sizes[path] for _, path in files)
    log.info("tokenising %d file(s), %.1f MiB; later runs find the tokens in the cache", len(files), total / 2**20)
    done, said = 0, time.monotonic()
    for number, (for_validation, path) in enumerate(files):
        if time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            log.info("tokenised %d of %d file(s), %.0f %% of the bytes", number, len(files), 100 * done / total)
        assert isinstance(path, Path), "documents are read from files"
        with named(path, for_validation=for_validation):
            for piece in read_pieces(path, text_key=corpus.text_key):
                yield _Origin(for_validation, piece.last), piece
        done += sizes[path]


class _Row:
    """A file to which tokens are appended; the encoder begins and ends each document."""

    def __init__(self, path: Path, dtype: str, encoder: Encoder) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._begin, self._end = np.array(encoder.begin, np.int64), np.array([encoder.end], np.int64)
        self._hash = hashlib.sha256()
        self._open_document = False
        self.tokens = 0

    def add(self, ids: NDArray[np.int64]) -> None:
        if not self._open_document:
            self._write(self._begin)
        self._open_document = True
        self._write(ids)

    def end_document(self) -> None:
        if self._open_document:
            self._write(self._end)
            self._open_document = False

    def _write(self, ids: NDArray[np.int64]) -> None:
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        # The rename that commits the entry must not reach the disk before the tokens do.
        os.fsync(self._file.fileno())
        self._file.close()
