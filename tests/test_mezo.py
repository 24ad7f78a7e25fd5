"""MeZO: its update is that of the paper and equal under every supported layout; it resumes; other uses are refused."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from tests.support.cases import Trained, train
from tests.support.harness import Overrides, composes, run_ranks
from tests.support.parity import ROWS, Distance, Row, distance, words
from tests.support.refusals import assert_refused
from tests.support.resuming import resume_each, train_and_save
from tests.support.selection import rows
from tests.support.shared import once
from tests.test_checkpoint_layouts import FLOAT64, SAVED, STEPS, apart, train_until_saved

MEZO = ("optimizer=mezo", "optimizer.lr=1e-4", "optimizer.weight_decay=0.1", "train.clip_grad_norm=0")
LORA = ("tuning=lora", "optimizer.lr=1e-2")
ACCUMULATE = ("train.gradient_accumulation_steps=2",)

# name -> (layout, processes, model, keys of both runs, keys of the tested layout alone)
CASES: dict[str, tuple[str, int, str, tuple[str, ...], tuple[str, ...]]] = {
    "ddp, tied": ("ddp", 2, "gpt2", ACCUMULATE, ()),
    "fsdp, kept gathered": ("fsdp", 2, "llama", (), ("parallel.reshard_after_forward=false",)),
    "tensor_fsdp, packed": ("tensor_fsdp", 4, "gpt2", (), ()),
    "fsdp, adapters": ("fsdp", 2, "llama", LORA, ()),
    "hsdp": ("hsdp", 4, "qwen3", (), ()),
    "tensor": ("tensor", 2, "llama", (), ()),
    "context": ("context", 2, "llama", (), ()),
    "fsdp_offload": ("fsdp_offload", 2, "llama", (), ()),
    "expert_fsdp": ("expert_fsdp", 4, "mixtral", (), ()),
}
OFTEN = {"ddp, tied", "fsdp, kept gathered", "tensor_fsdp, packed"}


@once
def alone(model: str, *keys: str) -> Trained:
    return run_ranks(1, train, words(model, "single", "fp64", 4, *MEZO, *keys))[0]


def measured(name: str, bug: str = "none") -> Distance:
    layout, processes, model, keys, own = CASES[name]
    expected = alone(model, *keys)
    assert len(set(expected.losses)) == 4 and min(expected.grad_norms) > 0
    found = run_ranks(processes, train_with, words(model, layout, "fp64", 4, *MEZO, *keys, *own), bug)
    return distance(found[0], expected)


@pytest.mark.parametrize("name", rows(zip(CASES), lambda name: name in OFTEN))
def test_every_layout_is_one_process(name: str) -> None:
    """The slope is a difference of two losses divided by 2 epsilon. The division magnifies their rounding too."""
    layout, processes, model, keys, own = CASES[name]
    found = measured(name)
    ROWS.append(Row(layout, " ".join([*own, *MEZO, *keys]), processes, model, "fp64", found))
    assert found.largest <= FLOAT64, found


@composes
def train_with(overrides: Overrides, bug: str) -> Trained:
    if bug == "none":
        return train(overrides)
    with patch("torch.distributed.fsdp.FSDPModule.reshard", lambda self: None):
        return train(overrides)


def test_parity_sees_copies_that_were_gathered_before_the_weights_moved() -> None:
    broken = measured("fsdp, kept gathered", "stale copies").largest
    assert math.isnan(broken) or broken > 1e4 * FLOAT64


def test_it_is_that_of_its_paper() -> None:
    """Algorithm 1: the update is the random direction times the learning rate times the slope."""
    moved = {}
    for lr in ("1e-4", "2e-4"):
        keys = ("optimizer.weight_decay=0", f"optimizer.lr={lr}", "scheduler=constant", "scheduler.warmup_steps=0")
        found = run_ranks(1, train, words("llama", "single", "fp64", 1, *MEZO, *keys))[0]
        still = run_ranks(1, train, words("llama", "single", "fp64", 1, *MEZO, *keys, "optimizer.lr=1e-30"))[0]
        difference = torch.cat([(found.parameters[k] - v).flatten() for k, v in still.parameters.items()])
        direction = difference / (float(lr) * found.grad_norms[0])
        assert direction.std().item() == pytest.approx(1, abs=0.02) and abs(direction.mean().item()) < 0.02
        moved[lr] = difference
    torch.testing.assert_close(moved["2e-4"], 2 * moved["1e-4"], rtol=1e-6, atol=1e-12)


def test_it_goes_on_under_another_layout(tmp_path: Path) -> None:
    def overrides(layout: str, *more: str) -> list[str]:
        saving = (f"checkpoint.every={SAVED}", "checkpoint.final=false")
        return words("gpt2", layout, "fp64", STEPS, *saving, *MEZO, *more)

    run_ranks(2, train_until_saved, overrides("fsdp"), str(tmp_path / "fsdp"))
    whole = run_ranks(1, train_and_save, overrides("single", "checkpoint.every=0"), str(tmp_path / "whole"))[0]
    (journal,) = run_ranks(2, resume_each, overrides("ddp"), [str(tmp_path / "fsdp")], STEPS - SAVED)[0]
    assert apart(journal, whole) <= FLOAT64


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("parallel=zero2", "optimizer.name=mezo: has no gradients and no states, which is what ZeRO partitions"),
        ("parallel=pipeline", "optimizer.name=mezo: parallel.pp=2 orders forwards with their backwards"),
        ("optimizer.in_backward=true", "optimizer.in_backward=true: mezo runs no backward"),
        ("train.clip_grad_norm=0 train.clip_grad_value=1", "train.clip_grad_value=1.0: mezo has one slope"),
        ("optimizer.beta1=0.5", "optimizer.beta1=0.5: mezo does not read it"),
        (
            "optimizer=adamw optimizer.groups.vector.name=mezo parallel=zero2",
            "optimizer.groups.vector.name=mezo: has no gradients and no states",
        ),
        ("optimizer.options.epsilon=0", "optimizer.options.epsilon=0: must be greater than 0"),
    ],
)
def test_what_it_cannot_is_refused(overrides: str, line: str) -> None:
    assert_refused(["optimizer=mezo", *overrides.split()], line)
