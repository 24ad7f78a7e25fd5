"""The parity tests can fail: with a planted bug, a layout differs from one process by far more than their tolerance."""

from __future__ import annotations

import math

import pytest

from tests.support.cases import Trained
from tests.support.harness import run_ranks
from tests.support.moe_cases import apart
from tests.support.mutations import BUGS, train_with
from tests.support.parity import distance, reference, words
from tests.support.shared import once
from tests.test_parity import FLOAT64, SMOOTHED, TORCH
from tests.test_quantized import CUT, FLOAT32

# bug -> (layout, processes, model)
PLANTED: dict[str, tuple[str, int, str]] = {
    "skipped_all_reduce": ("ddp", 2, "llama"),
    "mean_of_means": ("ddp", 2, "llama"),
    "last_micro_batch_only": ("ddp", 2, "llama"),
    "partial_gradients_not_summed": ("tensor", 2, "qwen3"),
    "tied_gradients_not_summed": ("pipeline", 2, "gpt2"),
    "local_norm": ("fsdp", 2, "llama"),
    "expert_gradients_not_averaged": ("expert_fsdp", 4, "mixtral"),
    "expert_shards_swapped": ("expert_fsdp", 4, "mixtral"),
}
STEPS = 4
EXTRA = ("train.gradient_accumulation_steps=2",)


# bug -> (layout, processes, keys); all runs have samples with padding.
BALANCE = ("moe=global_batch", "moe.coefficient=0.5", "train.gradient_accumulation_steps=2")
OF_EXPERTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "load_of_each_rank": ("ddp", 2, ()),
    "padding_counted_as_load": ("ddp", 2, ()),
    "recompute_counted_twice": ("fsdp", 2, ("train.activation_checkpointing=full",)),
}


# bug -> (layout, processes, precision, keys)
OF_KEYS: dict[str, tuple[str, int, str, tuple[str, ...]]] = {
    "adapters_drawn_by_each_rank": ("tensor", 2, "fp64", ("tuning=lora", "tuning.rank=4", "optimizer.lr=0.03")),
    "scales_of_the_first_rank": ("tensor", 2, "fp32", (*CUT, "optimizer=sgd", "optimizer.lr=0.3")),
    "smoothed_over_own_words": ("tensor", 2, "fp64", SMOOTHED),
    "averaged_on_the_first_rank": ("fsdp", 2, "fp64", SMOOTHED),
}


def test_every_bug_is_planted() -> None:
    assert BUGS.keys() - {"none"} == PLANTED.keys() | OF_EXPERTS.keys() | OF_KEYS.keys()


def test_what_sees_a_bug_runs_with_every_change() -> None:
    assert all(model in TORCH[layout][1] for layout, _, model in PLANTED.values())


@once
def trained(layout: str, processes: int, model: str, bug: str) -> Trained:
    return run_ranks(processes, train_with, bug, words(model, layout, "fp64", STEPS, *EXTRA))[0]


@pytest.mark.parametrize("bug", PLANTED)
def test_parity_sees_the_bug(bug: str) -> None:
    model = PLANTED[bug][2]
    expected = reference(model, "fp64", STEPS, *EXTRA)
    assert distance(trained(*PLANTED[bug], "none"), expected).largest <= FLOAT64
    broken = distance(trained(*PLANTED[bug], bug), expected)
    assert math.isnan(broken.largest) or broken.largest > 1e4 * FLOAT64, broken


@pytest.mark.parametrize("bug", OF_EXPERTS)
def test_parity_sees_the_bug_of_balancing(bug: str) -> None:
    layout, processes, keys = OF_EXPERTS[bug]
    assert apart(layout, processes, keys, BALANCE).largest <= FLOAT64
    assert apart(layout, processes, keys, BALANCE, bug).largest > 1e4 * FLOAT64


@pytest.mark.parametrize("bug", OF_KEYS)
def test_parity_sees_the_bug_of_a_key(bug: str) -> None:
    """Another test has a row for this layout without the bug."""
    layout, processes, precision, keys = OF_KEYS[bug]
    found = run_ranks(processes, train_with, bug, words("llama", layout, precision, STEPS, *keys))[0]
    limit = {"fp64": 1e4 * FLOAT64, "fp32": 10 * FLOAT32}[precision]
    assert distance(found, reference("llama", precision, STEPS, *keys)).largest > limit
