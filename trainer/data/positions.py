"""Which sample is at which position of the run, and which positions a rank reads. Arithmetic only.

    position p  ->  epoch p // count, place p % count in it  ->  sample order(epoch)[place]
    step s      ->  positions [s * G, (s + 1) * G),  G = global_batch_size
    micro-batch k of data rank r in step s  ->  s * G + (k * ranks + r) * micro_batch_size + [0, micro_batch_size)

Nothing here has state: a run that resumes at step s, on any number of ranks, computes the same numbers. The shuffle is
a cipher on the sample numbers instead of a stored list: constant memory for any size of data, immediate access to any
place of any epoch, and no dependence on the random streams of a NumPy version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np
from numpy.typing import NDArray

from trainer.plan.batch import BatchPlan

ROUNDS = 8  # with fewer, shuffles of less than ten samples favour some orders
_MASK = 2**64 - 1


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every output bit depends on every input bit. A bijection of 64-bit numbers."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers, in which their order counts."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix(key ^ np.array([number & _MASK], np.uint64))
    return int(key[0])


def permute(places: NDArray[np.int64], *, count: int, key: int) -> NDArray[np.int64]:
    """The target of each place of a shuffled range(count). places: any shape of numbers in [0, count).

    A Feistel network permutes the smallest square power of two that holds `count`; a number that lands outside is
    permuted again until it lands inside, which keeps the whole a permutation (cycle walking). The domain is less than 4
    * count, so that takes a few passes.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(np.array([key], np.uint64) ^ mix(np.arange(ROUNDS, dtype=np.uint64)))

    def encipher(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    result = encipher(places.astype(np.uint64))
    while (outside := result >= np.uint64(count)).any():
        result[outside] = encipher(result[outside])
    return result.astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The endless sequence of samples: every epoch visits each of `count` samples once."""

    count: int
    seed: int
    shuffle: bool

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers at these positions of the run."""
        epochs, places = np.divmod(positions, self.count)
        if not self.shuffle:
            return places
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permute(places[here], count=self.count, key=key_of(self.seed, int(epoch)))
        return samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The positions that one data-parallel rank reads."""

    batch: BatchPlan
    data_rank: int

    def micro_batches(self, first_step: int = 0) -> Iterator[range]:
        """Positions of each micro-batch, `gradient_accumulation_steps` of them per step. Endless."""
        micro, ranks = self.batch.micro_batch_size, self.batch.data_parallel_size
        for number in count_from(first_step * self.batch.gradient_accumulation_steps):
            start = (number * ranks + self.data_rank) * micro
            yield range(start, start + micro)

    def owns(self, position: int) -> bool:
        return position // self.batch.micro_batch_size % self.batch.data_parallel_size == self.data_rank

    def rounds(self, samples: int) -> Iterator[range]:
        """Divide `samples` positions over the ranks, equally many micro-batches for each; the last ones run past the
        end."""
        per_round = self.batch.micro_batch_size * self.batch.data_parallel_size
        for number, positions in enumerate(self.micro_batches()):
            if number * per_round >= samples:
                return
            yield positions
