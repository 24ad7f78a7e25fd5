"""Windows of a stream: its texts shuffled, tokenised and packed on the fly, starting anywhere in the stream.

    files of the epoch, shuffled    | file 5 ........... | file 2 ...... | file 9 ..
    blocks of data.shuffle_buffer   | block 0 | block 1 | block 2 | block 3 | ...     each in an order of its own
    one endless row of tokens       3 1 2 0 5 7 4 6 ...                             window p: tokens p * L to p * L + L

Every rank walks the same row and keeps its own windows. So a step is the same under any layout, at a price: each rank
reads and tokenises everything, so the whole run is as fast as one process can tokenise (about half a million tokens per
second and core). If that is too slow, or the data is read more than once, download it and use data=files, which
tokenises it into the cache.

When a text of a block is returned, one of the next block is read, so memory never holds more than one block's texts and
reading never pauses. The rest depends only on the beginning of the block and the number of texts returned since, so a
checkpoint holds these few numbers, and a resumed run reads one block again and the rest of the text in which its window
begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from trainer.data import Batch
from trainer.data.documents import content_hash
from trainer.data.positions import key_of, permute
from trainer.data.samples import make_batch
from trainer.data.stream import FilePlace, TextStream, tokens_of
from trainer.data.tokenizer import Encoder


class Place(NamedTuple):
    """Position before a text. file: index in the epoch's order. place: in that file, where the text's block begins.
    block: of the epoch. given: number of texts of the block before it."""

    epoch: int = 0
    file: int = 0
    place: FilePlace = FilePlace()
    block: int = 0
    given: int = 0


@dataclass(frozen=True, kw_only=True)
class StreamedSamples:
    """`Reading` of a stream, endless. seed: of the orders. threshold: text with a lower content hash is left out."""

    stream: TextStream
    encoder: Encoder
    seq_len: int
    seed: int
    threshold: int
    in_order: bool = True

    def open(self, mark: Any = None) -> OpenStream:
        """mark: from `OpenStream.mark`."""
        return OpenStream(self, mark)

    @property
    def block(self) -> int:
        """Number of texts that are shuffled together."""
        return self.stream.data.shuffle_buffer if self.stream.data.shuffle else 1

    def texts(self, start: Place) -> Iterator[tuple[Place, str]]:
        """The texts from a position on, epoch after epoch, each with its own position."""
        arriving = _Arriving(self, start)
        block = arriving.block()
        while True:
            begin, count = block[0][0], len(block)
            waiting: dict[int, str] = {number: text for number, (_, text) in enumerate(block)}
            block.clear()
            order = permute(np.arange(count), count=count, key=key_of(self.seed, begin.epoch, begin.block))
            for given, number in enumerate(order.tolist()):
                text = waiting.pop(number)
                if given >= start.given:
                    yield begin._replace(given=given), text
                    arriving.block(block, most=given + 1)
            block, start = arriving.block(block), Place()


class _Arriving:
    """Texts in file order, epoch after epoch, each with the position of a block that begins with it."""

    def __init__(self, samples: StreamedSamples, start: Place) -> None:
        self._size, self._texts = samples.block, self._walk(samples, start)
        self._next = next(self._texts)

    def block(
        self, begun: list[tuple[Place, str]] | None = None, *, most: int | None = None
    ) -> list[tuple[Place, str]]:
        """`begun` with more texts of its epoch: as many as make a block, or up to `most`."""
        block = [] if begun is None else begun
        while len(block) < min(self._size, most or self._size):
            if block and self._next[0].epoch != block[0][0].epoch:
                break
            block.append(self._next)
            self._next = next(self._texts)
        return block

    @staticmethod
    def _walk(samples: StreamedSamples, start: Place) -> Iterator[tuple[Place, str]]:
        number = start.block * samples.block
        for epoch in count_from(start.epoch):
            for file, shard in enumerate(samples.stream.order(epoch, seed=samples.seed)):
                if epoch == start.epoch and file < start.file:
                    continue
                here = start.place if (epoch, file) == (start.epoch, start.file) else FilePlace()
                for text, after in samples.stream.file(shard, here):
                    if text and content_hash(text) >= samples.threshold:
                        yield Place(epoch=epoch, file=file, place=here, block=number // samples.block), text
                        number += 1
                    # Only positions at which a block begins are ever requested, and a copy of the state takes time.
                    if number % samples.block == 0:
                        here = after()
            if not number:
                raise DataError(
                    f"data.name={samples.stream.data.name}: split {samples.stream.split} holds no text to train on;"
                    " choose another split, or set data.validation_fraction=0"
                )
            number = 0


class OpenStream:
    """A stream from a mark on. Windows must be requested in order."""

    def __init__(self, samples: StreamedSamples, mark: dict[str, Any] | None) -> None:
        self._seq_len, self._mark, start = samples.seq_len, mark, Place()
        self._end = samples.encoder.end if samples.stream.data.document_mask else None
        self._window = self._begin = 0  # the next window; position in the row of the first token in memory
        if mark is not None:
            epoch, file, place, block, given = mark["text"]
            start = Place(epoch, file, FilePlace(*place), block, given)
            self._window = mark["window"]
            self._begin = self._window * self._seq_len - mark["offset"]
        self._rows = tokens_of(samples.texts(start), samples.encoder)
        self._held = np.empty(0, np.int64)
        self._texts: list[tuple[int, Place]] = []  # texts with tokens in memory: the position of each in the row

    def at(self, positions: NDArray[np.int64]) -> Batch:
        return make_batch(np.stack([self._read(position) for position in positions.tolist()]), end=self._end)

    def mark(self) -> dict[str, Any] | None:
        """Mark of the window after the last one."""
        place = self._window * self._seq_len
        known = [(begin, text) for begin, text in self._texts if begin <= place]
        if not known:
            return self._mark
        begin, text = known[-1]
        return {"window": self._window, "offset": place - begin, "text": text}

    def _read(self, number: int) -> NDArray[np.int64]:
        """A window of seq_len + 1 tokens. The rest of an epoch continues into the next."""
        start = number * self._seq_len
        while self._begin + len(self._held) <= start + self._seq_len:
            self._drop(start)
            place, row = next(self._rows)
            self._texts.append((self._begin + len(self._held), place))
            self._held = np.concatenate([self._held, row])
        self._window = number + 1
        return self._held[start - self._begin :][: self._seq_len + 1]

    def _drop(self, place: int) -> None:
        """Drop tokens before this position in the row, and texts that end there."""
        surplus = min(max(0, place - self._begin), len(self._held))
        self._held, self._begin = self._held[surplus:], self._begin + surplus
        while len(self._texts) > 1 and self._texts[1][0] <= self._begin:
            self._texts.pop(0)
