"""Updates inside the backward equal the usual update under each supported layout; other combinations are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from configs.load import load_config
from tests.support.harness import run_ranks
from tests.support.parity import distance, measure, reference, words
from tests.support.refusals import assert_refused
from tests.support.resuming import resume_each, train_and_save
from tests.support.selection import rows
from tests.support.updating import BUGS, one_infinite_gradient, train_with
from tests.test_checkpoint_layouts import FLOAT64, SAVED, STEPS, apart, train_until_saved
from trainer.estimate.estimate import estimate
from trainer.estimate.explain import explain
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

IN_BACKWARD = "optimizer.in_backward=true"
NO_CLIPPING = ("train.clip_grad_norm=0",)
BY_VALUE = ("train.clip_grad_norm=0", "train.clip_grad_value=1e-3")
SGD = ("optimizer=sgd", "optimizer.lr=0.2")
FULL = ("train.activation_checkpointing=full",)
DROPOUT = ("model.config.resid_pdrop=0.1",)

# name -> (layout, processes, model, keys of both runs, keys of the in-backward run alone)
CASES: dict[str, tuple[str, int, str, tuple[str, ...], tuple[str, ...]]] = {
    "single, clipped by norm, dropout, tied": ("single", 1, "gpt2", DROPOUT, ()),
    "single, sgd, not clipped": ("single", 1, "llama", (*SGD, *NO_CLIPPING), ()),
    "ddp, clipped by norm, tied": ("ddp", 2, "gpt2", (), ()),
    "ddp, clipped by value": ("ddp", 2, "llama", BY_VALUE, ()),
    "fsdp, clipped by norm, recompute": ("fsdp", 2, "llama", (), FULL),
    "fsdp, not clipped, tied": ("fsdp", 2, "gpt2", NO_CLIPPING, ()),
    "fsdp, kept gathered": ("fsdp", 2, "llama", SGD, ("parallel.reshard_after_forward=false",)),
    "fsdp, adapters": ("fsdp", 2, "llama", ("tuning=lora", "optimizer.lr=0.03"), ()),
    "fsdp, adafactor": ("fsdp", 2, "llama", ("optimizer=adafactor", "optimizer.lr=0.02"), ()),
    "fsdp, 8-bit states": ("fsdp", 2, "llama", ("optimizer=adamw_8bit", "optimizer.lr=0.01"), ()),
    "fsdp, schedule-free": ("fsdp", 2, "llama", ("optimizer=schedule_free", "scheduler=constant"), ()),
    "hsdp": ("hsdp", 4, "qwen3", (), ()),
    "fsdp_offload": ("fsdp_offload", 2, "llama", NO_CLIPPING, ()),
    "context": ("context", 2, "llama", (), ()),
}
OFTEN = {"single, clipped by norm, dropout, tied", "ddp, clipped by value", "fsdp, clipped by norm, recompute"}
OFTEN |= {"fsdp, not clipped, tied"}


@pytest.mark.parametrize("name", rows(zip(CASES), lambda name: name in OFTEN))
def test_it_equals_the_usual_update_of_one_process(name: str) -> None:
    layout, processes, model, keys, own = CASES[name]
    found = measure([layout, IN_BACKWARD, *own], processes, model=model, precision="fp64", steps=4, extra=keys)
    # Adapters have small gradients early in training, and Adam magnifies the rounding errors of these gradients.
    assert found.largest <= (100 * FLOAT64 if "tuning=lora" in keys else FLOAT64), found


# bug -> the case that reveals it
PLANTED = {
    "other_random_numbers": "single, clipped by norm, dropout, tied",
    "replicas_not_averaged": "ddp, clipped by value",
    "norm_of_this_rank": "fsdp, clipped by norm, recompute",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_parity_sees_the_bug(bug: str) -> None:
    assert BUGS.keys() == PLANTED.keys()
    layout, processes, model, keys, own = CASES[PLANTED[bug]]
    expected = reference(model, "fp64", 4, *keys)
    ranks = run_ranks(processes, train_with, words(model, layout, "fp64", 4, IN_BACKWARD, *keys, *own), bug)
    broken = distance(ranks[0], expected)
    assert math.isnan(broken.largest) or broken.largest > 1e4 * FLOAT64, broken


def test_it_goes_on_under_another_layout_and_from_the_usual_update(tmp_path: Path) -> None:
    def overrides(layout: str, *more: str) -> list[str]:
        saving = (f"checkpoint.every={SAVED}", "checkpoint.final=false")
        return words("gpt2", layout, "fp64", STEPS, *saving, *more)

    run_ranks(2, train_until_saved, overrides("fsdp", IN_BACKWARD), str(tmp_path / "fsdp"))
    run_ranks(1, train_until_saved, overrides("single"), str(tmp_path / "usual"))
    whole = run_ranks(1, train_and_save, overrides("single", "checkpoint.every=0"), str(tmp_path / "whole"))[0]
    folders = [str(tmp_path / name) for name in ("fsdp", "usual")]
    journals = run_ranks(2, resume_each, overrides("ddp", IN_BACKWARD), folders, STEPS - SAVED)[0]
    assert max(apart(journal, whole) for journal in journals) <= FLOAT64


@pytest.mark.parametrize(("keys", "changes"), [((), False), (NO_CLIPPING, True)])
def test_a_gradient_that_is_not_finite(keys: tuple[str, ...], changes: bool) -> None:
    """With global norm clipping, the bad gradient is found before any parameter changes. Without it, the run ends and
    says what to do."""
    message, changed = run_ranks(1, one_infinite_gradient, words("llama", "single", "fp32", 2, IN_BACKWARD, *keys))[0]
    assert changed is changes
    assert ("has made part of this update; resume from the newest" in message) is changes


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("parallel=zero2", "optimizer.in_backward=true: DeepSpeed updates its own partitions"),
        (
            "parallel=pipeline",
            "optimizer.in_backward=true: parallel.pp=2 adds up the gradients of several micro-batches",
        ),
        ("parallel=tensor", "optimizer.in_backward=true: parallel.tp=2 sums some gradients over its ranks once a step"),
        (
            "train.gradient_accumulation_steps=2",
            "optimizer.in_backward=true: a gradient is gone before the next micro-batch could be added, and"
            " train.gradient_accumulation_steps is 2; raise train.micro_batch_size until it is 1",
        ),
        ("precision=fp16", "optimizer.in_backward=true: precision=fp16 leaves out an update"),
        ("train.non_finite=skip train.clip_grad_norm=0", "train.non_finite=skip: with optimizer.in_backward=true part"),
        ("optimizer=muon", "optimizer.in_backward=true: muon deals all matrices of a rank out at once"),
        (
            "train.clip_grad_value=1",
            "train.clip_grad_value=1.0: train.clip_grad_norm=1.0 clips too; set one of the two",
        ),
    ],
)
def test_what_it_cannot_is_refused(overrides: str, line: str) -> None:
    assert_refused([IN_BACKWARD, *overrides.split()], line)


def test_deepspeed_clips_by_the_norm_alone() -> None:
    keys = ["parallel=zero2", "train.clip_grad_norm=0", "train.clip_grad_value=1"]
    assert_refused(
        keys, "train.clip_grad_value=1.0: DeepSpeed clips by the global norm alone; use train.clip_grad_norm"
    )


def test_the_estimate_has_the_gradients_of_one_group_and_says_so(cache: str) -> None:
    short = ["parallel=single", "model=tiny", "data=synthetic", "data.seq_len=16", "train.micro_batch_size=1", cache]
    gradients: list[int] = []
    for keys in ([], ["optimizer=lomo"]):
        config = load_config([*short, "optimizer=sgd", *keys])
        plan = make_plan(config, Machine(world_size=1, local_world_size=1))
        predicted = estimate(config, plan)
        gradients.append(predicted.busiest.components["gradients"])
        said = explain(config, plan, predicted)
        assert ("each gradient is applied and freed inside the backward, forward and backward run twice" in said) == (
            keys != []
        )
        assert ("parameters and gradients 4 B x P" in said) == (keys == [])
    assert 0 < gradients[1] < 0.1 * gradients[0]
