"""Numbered samples: token windows over a packed text, and synthetic ones.

Documents stand one after the other in one long row of tokens, each ended by EOS, and sample i is the window

    tokens[i * seq_len : i * seq_len + seq_len + 1]      inputs: all but the last;  labels: all but the first

Neighbouring windows share one token, so every token but the first is a label exactly once. The last window is filled
up, with IGNORED labels. A window may span documents: attention crosses their border, and only the EOS separates them,
as is usual in pretraining. With `data.document_mask` positions restart at 0 after each EOS, attention stays inside a
document, and no document has to predict the first token of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import IGNORED, Batch
from trainer.data.positions import key_of, mix


class Samples(Protocol):
    """Samples that can be read in any order. Sent to loader processes, so its pickle must be small."""

    @property
    def count(self) -> int | None:
        """Number of samples; None: unlimited."""
        ...

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        """The samples of these numbers, in this order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """Tokens in a file, mapped into memory: all processes of a machine share one copy."""

    path: str
    dtype: str
    count: int

    def array(self) -> NDArray[np.integer]:
        return _map_file(self)


@lru_cache
def _map_file(file: TokenFile) -> NDArray[np.integer]:
    # A file of no bytes cannot be mapped.
    return np.memmap(file.path, file.dtype, "r", shape=(file.count,)) if file.count else np.empty(0, file.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenArray:
    """A few tokens, held in memory."""

    tokens: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.tokens)

    def array(self) -> NDArray[np.integer]:
        return self.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSamples:
    """Windows over a row of tokens. padding: token that fills up the last window, and that ends each document.
    separate: keep documents apart."""

    tokens: TokenFile | TokenArray
    seq_len: int
    padding: int
    separate: bool = False

    @property
    def count(self) -> int:
        return -(-max(0, self.tokens.count - 1) // self.seq_len)

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        tokens = self.tokens.array()
        rows = np.full((len(numbers), self.seq_len + 1), self.padding, np.int64)
        lengths, filled = (np.empty(len(numbers), np.int64) for _ in range(2))
        for row, number in enumerate(numbers):
            window = tokens[number * self.seq_len : (number + 1) * self.seq_len + 1]
            rows[row, : len(window)] = window
            lengths[row], filled[row] = len(window) - 1, min(len(window), self.seq_len)
        ignored = np.arange(self.seq_len) >= lengths[:, None]
        batch = make_batch(rows, ignored, end=self.padding if self.separate else None)
        return replace(batch, lengths=torch.from_numpy(filled))


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSamples:
    """Token t of sample p is a function of (seed, p, t). Low ids are frequent and high ones rare, so that a model has
    something to learn. Up to `ignore_fraction` of each sample's labels are IGNORED, from its start."""

    seed: int
    seq_len: int
    vocab_size: int
    ignore_fraction: float
    count: int | None = None

    def read(self, numbers: NDArray[np.int64]) -> Batch:
        sample_keys = mix(mix(numbers.astype(np.uint64)) ^ np.uint64(key_of(self.seed)))
        noise = mix(sample_keys[:, None] ^ mix(np.arange(self.seq_len + 2, dtype=np.uint64)))
        uniform = (noise >> np.uint64(11)) * 2.0**-53
        # A product and not a power: a power's last bit differs between machines.
        rows = (uniform * uniform * uniform * self.vocab_size).astype(np.int64)[:, 1:]
        longest = int(self.ignore_fraction * self.seq_len)
        prefix = (uniform[:, 0] * (longest + 1)).astype(np.int64)
        return make_batch(rows, np.arange(self.seq_len) < prefix[:, None])


def make_batch(rows: NDArray[np.int64], ignored: NDArray[np.bool_] | None = None, *, end: int | None = None) -> Batch:
    """rows: [n, seq_len + 1]. ignored: [n, seq_len], True for labels without loss. end: the token that ends a document,
    if documents are to be separated."""
    inputs, labels = np.array(rows[:, :-1]), np.array(rows[:, 1:])
    if ignored is not None:
        labels[ignored] = IGNORED
    positions = None
    if end is not None:
        labels[inputs == end] = IGNORED
        positions = torch.from_numpy(_positions(inputs, end))
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), positions)


def _positions(inputs: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    """[n, seq_len]: each token's position in its document, as far as the row holds it."""
    places = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    begins = np.zeros_like(inputs)
    begins[:, 1:] = np.where(inputs[:, :-1] == end, places[:, 1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)
