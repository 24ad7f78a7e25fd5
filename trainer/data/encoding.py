"""Documents to tokens, the same whether their text arrives in pieces or as one string.

    text     |------- piece 1 -------|------- piece 2 -------|----- piece 3 -----|
    windows  |----------------------- 1 ----------------|                              encoded separately,
                                                  |--------------- 2 ------------|     with an overlap
    tokens   |  |   |    |  |     |  |   |   |   |  :  |  |    |   |     |  |    |     changed over where both agree

A tokenizer may join characters across the border of two pieces (a newline and the spaces after it), and may treat the
beginning of a text specially. So a document is encoded as a whole, and each piece gets the tokens that begin in it. A
document of more than WINDOW characters is encoded in overlapping windows. They are joined in the middle of a run of
AGREEMENT tokens that both windows share, away from their ends; if there is none, both are encoded as one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.documents import Piece
from trainer.data.plain_text import Encoded
from trainer.data.tokenizer import Encoder

BULK_CHARACTERS = 2**20
WINDOW = 2**18
OVERLAP = 2**12
AGREEMENT = 16

T = TypeVar("T")


def encode_documents(
    pieces: Iterable[tuple[T, Piece]],
    encoder: Encoder,
    *,
    characters: int = BULK_CHARACTERS,
    window: int = WINDOW,
    overlap: int = OVERLAP,
) -> Iterator[tuple[T, str, NDArray[np.int64]]]:
    """Each piece with its token ids, in order.

    characters: how much text is encoded at once, which keeps the tokenizer's threads busy.
    window, overlap: in characters.
    """
    if not encoder.places:
        pieces = _single(pieces) if encoder.borders_matter else pieces
        for bulk in _bulks((((tag, piece.text), len(piece.text)) for tag, piece in pieces), characters):
            for (tag, text), ids in zip(bulk, encoder.encode([text for _, text in bulk]), strict=True):
                yield tag, text, ids
        return
    document: _Document[T] | None = None
    windows = ((each, len(each.text)) for each in _windows(pieces, window, overlap))
    for bulk in _bulks(windows, characters):
        for each, encoded in zip(bulk, _encode(bulk, encoder), strict=True):
            if document is None and each.last and len(each.pieces) == 1:
                yield *each.pieces[0], encoded.ids
                continue
            document = document or _Document(encoder)
            yield from document.add(each, encoded)
            document = None if each.last else document


class _Window(NamedTuple, Generic[T]):
    """base: index of its first character in the document. pieces: those that were read for it. last: the document ends
    with it."""

    base: int
    text: str
    pieces: list[tuple[T, str]]
    last: bool


def _windows(pieces: Iterable[tuple[T, Piece]], window: int, overlap: int) -> Iterator[_Window[T]]:
    base, texts, length, read = 0, [], 0, []
    for tag, piece in pieces:
        texts.append(piece.text)
        length += len(piece.text)
        read.append((tag, piece.text))
        if piece.last:
            yield _Window(base, "".join(texts), read, True)
            base, texts, length, read = 0, [], 0, []
        elif length >= window + overlap:
            text = "".join(texts)
            yield _Window(base, text, read, False)
            base, texts, length, read = base + length - overlap, [text[-overlap:]], overlap, []


def _single(pieces: Iterable[tuple[T, Piece]]) -> Iterator[tuple[T, Piece]]:
    """Each document in one piece."""
    texts: list[str] = []
    for tag, piece in pieces:
        texts.append(piece.text)
        if piece.last:
            yield tag, Piece("".join(texts), last=True)
            texts = []


def _bulks(items: Iterable[tuple[T, int]], size: int) -> Iterator[list[T]]:
    bulk: list[T] = []
    waiting = 0
    for item, length in items:
        bulk.append(item)
        waiting += length
        if waiting >= size:
            yield bulk
            bulk, waiting = [], 0
    if bulk:
        yield bulk


def _encode(windows: list[_Window[T]], encoder: Encoder) -> list[Encoded]:
    """Token positions cost time, so they are computed only for documents with several pieces."""
    alone = [each.base == 0 and each.last and len(each.pieces) == 1 for each in windows]
    found: dict[bool, Iterator[Encoded]] = {}
    for kind in set(alone):
        texts = [each.text for each, is_alone in zip(windows, alone, strict=True) if is_alone is kind]
        found[kind] = iter(encoder.encode_with_places(texts, places=not kind))
    return [next(found[kind]) for kind in alone]


@dataclass
class _Document(Generic[T]):
    """A document of several pieces or windows; its newest window is held back until the next one has arrived.

    pieces: not returned yet, each with its end in characters.
    """

    encoder: Encoder
    pieces: deque[tuple[T, str, int]] = field(default_factory=deque)
    read: int = 0
    base: int = 0
    text: str = ""
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    starts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    begin: int = 0
    ready: list[NDArray[np.int64]] = field(default_factory=list)
    ready_starts: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, window: _Window[T], encoded: Encoded) -> Iterator[tuple[T, str, NDArray[np.int64]]]:
        """The pieces that are complete with it."""
        for tag, text in window.pieces:
            self.read += len(text)
            self.pieces.append((tag, text, self.read))
        assert encoded.starts is not None
        ids, starts = encoded.ids, encoded.starts + window.base
        if not self.text:
            self._hold(window.base, window.text, ids, starts, 0)
        elif (border := self._border(ids, starts, window.base)) is not None:
            mine, theirs = border
            self._release(mine)
            self._hold(window.base, window.text, ids, starts, theirs)
            yield from self._complete(int(starts[theirs]))
        else:
            self._merge(window)
        if window.last:
            self._release(len(self.ids))
            yield from self._complete(None)

    def _hold(self, base: int, text: str, ids: NDArray[np.int64], starts: NDArray[np.int64], begin: int) -> None:
        self.base, self.text, self.ids, self.starts, self.begin = base, text, ids, starts, begin

    def _release(self, end: int) -> None:
        self.ready.append(self.ids[self.begin : end])
        self.ready_starts.append(self.starts[self.begin : end])

    def _border(self, ids: NDArray[np.int64], starts: NDArray[np.int64], base: int) -> tuple[int, int] | None:
        """The same token in this window and in the next: the one at which to switch."""
        shared = self.base + len(self.text) - base
        low, high = base + shared // 4, base + shared - shared // 4
        mine = {
            (int(self.starts[i]), int(self.ids[i])): i
            for i in range(int(np.searchsorted(self.starts, low)), len(self.ids))
        }
        for theirs in range(int(np.searchsorted(starts, low)), int(np.searchsorted(starts, high)) - AGREEMENT):
            place = mine.get((int(starts[theirs]), int(ids[theirs])))
            if place is None or place < self.begin:
                continue
            here, there = slice(place, place + AGREEMENT), slice(theirs, theirs + AGREEMENT)
            if np.array_equal(self.ids[here], ids[there]) and np.array_equal(self.starts[here], starts[there]):
                middle = AGREEMENT // 2
                # Not between the tokens of one character.
                while middle and starts[theirs + middle] == starts[theirs + middle - 1]:
                    middle -= 1
                if middle:
                    return place + middle, theirs + middle
        return None

    def _merge(self, window: _Window[T]) -> None:
        """Encode both windows as one."""
        text = self.text + window.text[self.base + len(self.text) - window.base :]
        (encoded,) = self.encoder.encode_with_places([text], places=True)
        assert encoded.starts is not None
        starts = encoded.starts + self.base
        begin = int(np.searchsorted(starts, self.starts[self.begin])) if self.begin else 0
        self._hold(self.base, text, encoded.ids, starts, begin)

    def _complete(self, border: int | None) -> Iterator[tuple[T, str, NDArray[np.int64]]]:
        """border: all tokens that begin before this character are known; None: all tokens of the document."""
        ids, starts = np.concatenate(self.ready), np.concatenate(self.ready_starts)
        used = 0
        while self.pieces and (border is None or self.pieces[0][2] <= border):
            tag, text, end = self.pieces.popleft()
            stop = int(np.searchsorted(starts, end)) if self.pieces or border is not None else len(ids)
            yield tag, text, ids[used:stop]
            used = stop
        self.ready, self.ready_starts = [ids[used:]], [starts[used:]]
