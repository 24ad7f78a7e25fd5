"""Learning-rate schedules and parameter groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from configs.load import load_config
from trainer.optimizer import build_optimizer, lr_at, param_groups


def rates(*overrides: str) -> list[float]:
    config = load_config(["optimizer.lr=1.0", *overrides])
    return [lr_at(config, step) for step in range(config.train.steps)]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decaying_schedules_reach_the_floor_at_the_last_step(name: str) -> None:
    found = rates(f"scheduler={name}", "train.steps=10", "scheduler.warmup_steps=3", "scheduler.min_lr_ratio=0.2")
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert found[-1] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(found[2:]))


def test_constant() -> None:
    assert rates("scheduler=constant", "train.steps=4", "scheduler.warmup_steps=2") == [0.5, 1.0, 1.0, 1.0]


def test_warmup_stable_decay() -> None:
    keys = ("train.steps=10", "scheduler.warmup_steps=2", "scheduler.decay_steps=4", "scheduler.min_lr_ratio=0.0")
    assert rates("scheduler=wsd", *keys) == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_linear_decay_has_the_slope_of_transformers() -> None:
    """transformers decays to 0 one step after the last; with its number of steps one less the two agree."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=9)
    theirs = []
    for _ in range(10):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates("scheduler=linear", "train.steps=10", "scheduler.min_lr_ratio=0.0") == pytest.approx(theirs)


def test_norms_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    decayed, plain = param_groups(model.named_parameters(), 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3), (5, 4)] and decayed["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in plain["params"]] == [(4,), (4,), (4,)] and plain["weight_decay"] == 0.0


@pytest.mark.parametrize("implementation", ["auto", "fused", "foreach", "for_loop"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_every_implementation_makes_the_same_update(name: str, implementation: str) -> None:
    results = []
    for choice in (implementation, "for_loop"):
        config = load_config([f"optimizer={name}", f"optimizer.implementation={choice}"]).optimizer
        parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        optimizer = build_optimizer(param_groups([("w", parameter)], 0.1), config)
        for _ in range(3):
            parameter.grad = parameter.detach().cos()
            optimizer.step()
        results.append(parameter.detach())
    assert not torch.equal(results[0], torch.arange(6.0).reshape(2, 3))
    torch.testing.assert_close(results[0], results[1])
