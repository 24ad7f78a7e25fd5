"""The parity tests can fail: a planted bug sets a layout apart from one process by far more than their tolerance."""

from __future__ import annotations

import math

import pytest

from tests.harness import run_ranks
from tests.mutations import BUGS, train_with
from tests.parity import distance, reference, words
from tests.test_parity import FLOAT64

# bug -> (layout, processes, model)
PLANTED: dict[str, tuple[str, int, str]] = {
    "skipped_all_reduce": ("ddp", 2, "llama"),
    "mean_of_means": ("ddp", 2, "llama"),
    "last_micro_batch_only": ("ddp", 2, "llama"),
    "partial_gradients_not_summed": ("tensor", 2, "qwen3"),
    "tied_gradients_not_summed": ("pipeline", 2, "gpt2"),
    "local_norm": ("fsdp", 2, "llama"),
}
STEPS = 4
EXTRA = ("train.gradient_accumulation_steps=2",)


def test_every_bug_is_planted() -> None:
    assert BUGS.keys() - {"none"} == PLANTED.keys()


@pytest.mark.parametrize("bug", PLANTED)
def test_parity_sees_the_bug(bug: str) -> None:
    layout, processes, model = PLANTED[bug]
    expected = reference(model, "fp64", STEPS, *EXTRA)
    overrides = words(model, layout, "fp64", STEPS, *EXTRA)
    healthy = run_ranks(processes, train_with, "none", overrides)[0]
    assert distance(healthy, expected).largest <= FLOAT64
    broken = distance(run_ranks(processes, train_with, bug, overrides)[0], expected)
    assert math.isnan(broken.largest) or broken.largest > 1e4 * FLOAT64, broken
