"""Tokenised conversations on disk, and samples made of them: one conversation each, or several packed.

    CACHE_DIR/KEY/train.bin        token ids of all conversations, one after the other; validation.bin likewise
    CACHE_DIR/KEY/train.trained    a byte per token: 1 where the assistant speaks
    CACHE_DIR/KEY/train.lengths    int64: tokens of each conversation, and how many come before the assistant's first

    data.packing=false    | conversation 3 ......................., padding            |
    data.packing=true     | conversation 3 ..............., 17 ......, 4 ..., padding  |     best fit decreasing

A conversation is never split: one that is longer than `data.seq_len` loses its end, and one that thereby loses every
turn of the assistant is dropped. Packing is best fit decreasing: longest first, each into the fullest sample with
enough room, which leaves a few per cent of padding if lengths vary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from configs.errors import DataError
from trainer.data import IGNORED, Batch
from trainer.data.cache import PROGRESS_SECONDS, Corpus, both_sides, named, renamed
from trainer.data.chat import ChatEncoder
from trainer.data.documents import content_hash
from trainer.data.entries import META, cached, check_files, token_dtype
from trainer.data.formats.common import Reading
from trainer.data.messages import Conversation, read_conversations
from trainer.data.samples import TokenFile
from trainer.data.split import Split
from trainer.data.tokenizer import Encoder

SIDES = ("train", "validation")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationFile:
    """One side of the split. lengths: [count, 2]: tokens, and tokens before the assistant's first."""

    tokens: TokenFile
    trained: TokenFile
    lengths: TokenFile

    @property
    def count(self) -> int:
        return self.lengths.count // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations:
    """digest: of all tokens and of which are trained on. forms: forms of the rows, each with its count. skipped: number
    of skipped rows; why: the problem of the first."""

    training: ConversationFile
    validation: ConversationFile
    digest: str
    forms: Mapping[str, int]
    skipped: int
    why: str

    def describe(self) -> str:
        forms = ", ".join(f"{count:,} x {name}" for name, count in self.forms.items())
        return f"read as {forms or 'nothing'}" + (
            f"; {self.skipped:,} row(s) skipped, the first: {self.why}" if self.skipped else ""
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Meta:
    dtype: str
    tokens: tuple[int, int]
    conversations: tuple[int, int]
    digest: str
    forms: dict[str, int]
    skipped: int
    why: str


def load_conversations(
    corpus: Corpus, encoder: Encoder, reading: Reading, *, tokenizer_key: str, cache_dir: str
) -> Conversations:
    """The corpus's conversations as tokens, from the cache or tokenised now.

    tokenizer_key: config key with the tokenizer's name. Raises DataError for unusable rows.
    """
    chat = ChatEncoder(encoder, key=tokenizer_key)
    identity = f"chat 3 {transformers.__version__} {corpus.key(encoder)} {chat.templates} {reading.identity()}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return cached(cache_dir, key, build=lambda folder: _build(corpus, encoder, chat, reading, folder), read=_open)


def _open(folder: Path) -> Conversations:
    meta = _Meta(**json.loads((folder / META).read_text()))
    sides = []
    for side, tokens, count in zip(SIDES, meta.tokens, meta.conversations, strict=True):
        files = {
            "tokens": TokenFile(path=str(folder / f"{side}.bin"), dtype=meta.dtype, count=tokens),
            "trained": TokenFile(path=str(folder / f"{side}.trained"), dtype="uint8", count=tokens),
            "lengths": TokenFile(path=str(folder / f"{side}.lengths"), dtype="int64", count=2 * count),
        }
        check_files(folder, {Path(f.path).name: f.count * np.dtype(f.dtype).itemsize for f in files.values()})
        sides.append(ConversationFile(**files))
    return Conversations(
        training=sides[0],
        validation=sides[1],
        digest=meta.digest,
        forms=meta.forms,
        skipped=meta.skipped,
        why=meta.why,
    )


def _build(corpus: Corpus, encoder: Encoder, chat: ChatEncoder, reading: Reading, folder: Path) -> None:
    log.info(
        "tokenising the conversations of %d file(s) or split(s); later runs find them in the cache",
        len(corpus.training) + len(corpus.validation),
    )
    threshold, hashes = 0 if corpus.validation else int(corpus.fraction * 2**64), []
    if threshold:
        hashes = [_hash(conversation) for conversation, _, _ in _all(corpus, reading, [])]
        threshold = both_sides(threshold, min(hashes, default=0), max(hashes, default=0))
    dtype, digest = token_dtype(encoder.vocabulary), hashlib.sha256()
    tokens, conversations = [0, 0], [0, 0]
    said, unused = time.monotonic(), dict[str, None]()
    forms, skipped = Counter[str](), list[str]()
    with ExitStack() as stack:
        files = [
            {
                kind: stack.enter_context((folder / f"{side}.{kind}").open("wb"))
                for kind in ("bin", "trained", "lengths")
            }
            for side in SIDES
        ]
        for conversation, for_validation, entry in _all(corpus, reading, skipped):
            try:
                with named(entry, for_validation=for_validation):
                    ids, trained = chat.encode(conversation)
            except DataError as error:
                if not reading.skip:
                    raise
                skipped.append(str(error))
                continue
            unused |= dict.fromkeys(conversation.unused)
            forms[conversation.form] += 1
            side = int(for_validation or _hash(conversation) < threshold)
            written = {
                "bin": ids.astype(dtype).tobytes(),
                "trained": trained.astype(np.uint8).tobytes(),
                "lengths": np.array([len(ids), int(trained.argmax())], np.int64).tobytes(),
            }
            for kind, data in written.items():
                files[side][kind].write(data)
                digest.update(data)
            tokens[side] += len(ids)
            conversations[side] += 1
            if time.monotonic() - said > PROGRESS_SECONDS:
                said = time.monotonic()
                log.info("tokenised %d conversations", sum(conversations))
    if skipped and not forms:
        raise DataError(f"data.bad_rows=skip: all {len(skipped):,} row(s) were left out, the first: {skipped[0]}")
    _tell(unused, chat.spelled)
    meta = _Meta(
        dtype=dtype,
        tokens=(tokens[0], tokens[1]),
        conversations=(conversations[0], conversations[1]),
        digest=digest.hexdigest(),
        forms=dict(forms),
        skipped=len(skipped),
        why=next(iter(skipped), ""),
    )
    (folder / META).write_text(json.dumps(asdict(meta)))


def _tell(unused: Iterable[str], spelled: int) -> None:
    """Log which fields are not read, and how many conversations spell control tokens."""
    if unused:
        log.info("fields of the rows that play no part: %s", ", ".join(unused))
    if spelled:
        log.info(
            "%d conversation(s) spell control tokens of the tokenizer, which stay text; data.control_tokens=true makes"
            " tokens of them",
            spelled,
        )


def _all(corpus: Corpus, reading: Reading, skipped: list[str]) -> Iterator[tuple[Conversation, bool, Path | Split]]:
    """Every conversation, whether it is for validation, and its file or split."""
    for for_validation, entry in corpus.entries():
        wrong: list[str] = []
        with named(entry, for_validation=for_validation):
            for conversation in read_conversations(entry, reading, wrong):
                yield conversation, for_validation, entry
        skipped += (renamed(line, entry, for_validation=for_validation) for line in wrong)


def _hash(conversation: Conversation) -> int:
    """Hash of the conversation itself: its copies fall on the same side of the split."""
    return content_hash(json.dumps([[m["role"], m.get("content")] for m in conversation.messages]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationSamples:
    """`Samples` of seq_len tokens. padding: token that fills them up. packing: several conversations in one. separate:
    positions restart at 0 in each, so that attention separates them."""

    file: ConversationFile
    seq_len: int
    padding: int
    packing: bool
    separate: bool

    @property
    def count(self) -> int:
        return len(_arrange(self)[0])

    @property
    def conversations(self) -> int:
        """Number of used conversations: those that keep a turn of the assistant."""
        return sum(map(len, _arrange(self)[0]))

    @property
    def tokens(self) -> int:
        """Tokens in all samples, without padding."""
        samples, _, lengths = _arrange(self)
        return int(sum(lengths[numbers].sum() for numbers in samples))

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        tokens, trained = self.file.tokens.array(), self.file.trained.array()
        samples, starts, lengths = _arrange(self)
        shape = (len(numbers), self.seq_len)
        ids, labels = np.full(shape, self.padding, np.int64), np.full(shape, IGNORED, np.int64)
        filled = np.zeros(len(numbers), np.int64)
        positions = np.tile(np.arange(self.seq_len, dtype=np.int64), (len(numbers), 1))
        for row, number in enumerate(numbers):
            place = 0
            for conversation in samples[number]:
                start, length = int(starts[conversation]), int(lengths[conversation])
                here = slice(place, place + length)
                ids[row, here] = tokens[start : start + length]
                following = tokens[start + 1 : start + length].astype(np.int64)
                labels[row, place : place + length - 1] = np.where(
                    trained[start + 1 : start + length], following, IGNORED
                )
                positions[row, here] = np.arange(length)
                place += length
            filled[row] = place
            # Padding continues the last conversation: it sees that conversation, and nothing sees the padding.
            positions[row, place:] = np.arange(self.seq_len - place) + (positions[row, place - 1] + 1)
        batch = (torch.from_numpy(ids), torch.from_numpy(labels))
        return Batch(*batch, torch.from_numpy(positions) if self.separate else None, torch.from_numpy(filled))


@lru_cache
def _arrange(samples: ConversationSamples) -> tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]:
    """The conversations of each sample; the position of each in the file; the number of its used tokens."""
    pairs = np.asarray(samples.file.lengths.array(), np.int64).reshape(-1, 2)
    lengths = np.minimum(pairs[:, 0], samples.seq_len)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(pairs[:, 0])])
    kept = np.flatnonzero((pairs[:, 1] < lengths) & (lengths > 1))
    if not samples.packing:
        return list(kept.reshape(-1, 1)), starts, lengths
    return [np.array(sample) for sample in pack(lengths, kept, seq_len=samples.seq_len)], starts, lengths


def pack(lengths: NDArray[np.int64], kept: NDArray[np.int64], *, seq_len: int) -> list[list[int]]:
    """Best fit decreasing: the indices `kept`, in samples whose lengths add up to at most seq_len."""
    samples: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each sample that has any, sorted: tokens left, and its index
    for number in kept[np.argsort(-lengths[kept], kind="stable")].tolist():
        length = int(lengths[number])
        place = bisect_left(room, (length, -1))
        left, sample = room.pop(place) if place < len(room) else (seq_len, len(samples))
        if sample == len(samples):
            samples.append([])
        samples[sample].append(number)
        if left > length:
            insort(room, (left - length, sample))
    return samples
