"""The order of samples: the shuffle is a permutation, and every layout divides the same positions."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from trainer.data.positions import Order, Share, key_of, permute
from trainer.plan.batch import BatchPlan


def test_shuffle_is_a_permutation_of_any_size() -> None:
    for count in [*range(1, 70), 127, 128, 129, 1000, 10_007]:
        places = np.arange(count)
        shuffled = permute(places, count=count, key=key_of(count))
        assert np.array_equal(np.sort(shuffled), places)


def test_shuffle_gives_any_place_alone() -> None:
    whole = permute(np.arange(1000), count=1000, key=3)
    assert [permute(np.array([place]), count=1000, key=3)[0] for place in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_shuffle_is_fair(count: int) -> None:
    """Over many keys, every sample comes at every position equally often (chi-squared within 5 sigma)."""
    trials, seen = 3000, np.zeros((count, count))
    for trial in range(trials):
        seen[np.arange(count), permute(np.arange(count), count=count, key=key_of(7, trial))] += 1
    expected = trials / count
    chi_squared, freedom = ((seen - expected) ** 2 / expected).sum(), (count - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_in_the_shuffle_are_unrelated() -> None:
    count = 20_011
    shuffled = permute(np.arange(count), count=count, key=1)
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 5 / np.sqrt(count)


def test_shuffle_never_changes() -> None:
    """The numbers are recorded. With other numbers, runs of earlier versions would resume on other samples."""
    assert key_of(0) == 0xE220A8397B1DCDAF
    assert permute(np.arange(8), count=8, key=key_of(0, 0)).tolist() == [4, 0, 7, 5, 1, 2, 3, 6]
    places = np.array([0, 999_999, 123_456_789])
    assert permute(places, count=10**9 + 7, key=42).tolist() == [153710110, 439028688, 747836213]


def test_every_epoch_visits_every_sample_once_in_a_new_order() -> None:
    order = Order(count=37, seed=5, shuffle=True)
    samples = order(np.arange(3 * 37)).reshape(3, 37)
    assert all(np.array_equal(np.sort(epoch), np.arange(37)) for epoch in samples)
    assert len({tuple(epoch) for epoch in samples.tolist()}) == 3
    assert not np.array_equal(Order(count=37, seed=6, shuffle=True)(np.arange(37)), samples[0])
    # A micro-batch may lie across the border of two epochs.
    assert np.array_equal(order(np.arange(30, 50)), samples.reshape(-1)[30:50])


def test_without_shuffle_samples_come_as_they_stand() -> None:
    assert Order(count=5, seed=0, shuffle=False)(np.arange(12)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


LAYOUTS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2), (4, 2, 1), (8, 1, 1)]


@pytest.mark.parametrize(("ranks", "accumulation", "micro"), LAYOUTS)
def test_every_layout_divides_the_same_positions(ranks: int, accumulation: int, micro: int) -> None:
    for step in (0, 1, 1000):
        read = []
        for share in shares(ranks, accumulation, micro):
            mine = [p for positions in islice(share.micro_batches(step), accumulation) for p in positions]
            assert all(share.owns(position) for position in mine)
            read += mine
        assert sorted(read) == list(range(step * 8, (step + 1) * 8))


@pytest.mark.parametrize(("ranks", "accumulation", "micro"), LAYOUTS)
@pytest.mark.parametrize("samples", [0, 1, 7, 8, 9, 64])
def test_validation_rounds_are_equally_many_on_every_rank(
    ranks: int, accumulation: int, micro: int, samples: int
) -> None:
    rounds = [list(share.rounds(samples)) for share in shares(ranks, accumulation, micro)]
    assert len({len(mine) for mine in rounds}) == 1
    read = sorted(position for mine in rounds for positions in mine for position in positions)
    assert read[:samples] == list(range(samples))
    assert len(read) - samples < ranks * micro


def shares(ranks: int, accumulation: int, micro: int) -> list[Share]:
    batch = BatchPlan(
        micro_batch_size=micro, gradient_accumulation_steps=accumulation, data_parallel_size=ranks, seq_len=4
    )
    return [Share(batch=batch, data_rank=rank) for rank in range(ranks)]
