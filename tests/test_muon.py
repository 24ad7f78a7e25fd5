"""Muon: its update equals a written-out reference and a single process under every sharding. Collectives and memory are
as predicted."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from tests.support.harness import run_ranks
from tests.support.muon_cases import (
    BUCKETS,
    CELLS,
    LAYOUTS,
    MATRICES,
    PLANTED,
    WIDE,
    costs,
    cuts_and_bugs,
    one_process,
    values,
)
from tests.test_imports import HEAVY, reached
from trainer.model.roles import Matrices
from trainer.optim.muon.newton_schulz import JORDAN, orthogonalize_
from trainer.optim.muon.owners import assign, boxes, flops, update_bytes
from trainer.optim.muon.update import Muon

CHOICES = [
    {},
    {"nesterov": False, "adjust_lr": "match_rms_adamw", "bucket_bytes": 1500, "steps": 3},
]


def written_out(gradients: list[torch.Tensor], start: torch.Tensor, *, transposed: bool, lr: float, **options):
    """Computes the update of Jordan 2024 for one float64 matrix, with the decay and scale of Liu et al. 2025."""
    a, b, c = options.get("coefficients", JORDAN)
    weight, momentum = start.clone(), torch.zeros_like(start)
    rows, columns = weight.T.shape if transposed else weight.shape
    scale = math.sqrt(max(1, rows / columns))
    if options.get("adjust_lr") == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum if options.get("nesterov", True) else momentum
        x = x / x.square().sum().sqrt()
        for _ in range(options.get("steps", 5)):
            x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
        weight = weight - lr * 0.1 * weight - lr * scale * x
    return weight


@pytest.mark.parametrize("options", [*CHOICES, {"coefficients": (2.0, -1.5, 0.5), "steps": 12}])
def test_one_process_is_what_is_written_out(options: dict) -> None:
    found, start, gradients = one_process(options), values(0), [values(step) for step in (1, 2, 3)]
    for place, (name, (shape, matrices)) in enumerate(MATRICES.items()):
        for box in boxes(shape, matrices):
            take = tuple(slice(*run) for run in box)
            pieces = [tensor[name][take].reshape(*found[name][take].shape[-2:]) for tensor in (start, *gradients)]
            expected = written_out(
                pieces[1:], pieces[0], transposed=matrices.transposed, lr=(0.02, 0.03)[place % 2], **options
            )
            torch.testing.assert_close(found[name][take].reshape_as(expected), expected, rtol=0, atol=1e-12)


def test_experts_and_packed_matrices_are_orthogonal_one_by_one() -> None:
    found = one_process({"coefficients": (2.0, -1.5, 0.5), "steps": 30}, steps=1)
    start = values(0)
    for place, (name, (shape, matrices)) in enumerate(MATRICES.items()):
        lr = (0.02, 0.03)[place % 2]
        for box in boxes(shape, matrices):
            take = tuple(slice(*run) for run in box)
            update = ((1 - lr * 0.1) * start[name] - found[name])[take].squeeze(0) / lr
            singular = torch.linalg.svdvals(update)
            torch.testing.assert_close(singular, singular[:1].expand_as(singular), rtol=1e-6, atol=0)


def test_the_other_parameters_get_the_update_of_adamw() -> None:
    found = one_process({})
    for name in ("bias", "embedding"):
        parameter = nn.Parameter(values(0)[name])
        optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1, fused=True)
        for step in (1, 2, 3):
            parameter.grad = values(step)[name]
            optimizer.step()
        assert torch.equal(found[name], parameter.detach())


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_in_bfloat16_it_is_torchs_own(nesterov: bool, adjust_lr: str) -> None:
    torch.manual_seed(0)
    shapes = [(48, 80), (96, 32), (64, 64)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    group = {"params": ours, "matrices": [Matrices()] * 3, "nesterov": nesterov, "adjust_lr": adjust_lr}
    muon = Muon([{**group, "lr": 0.02, "weight_decay": 0.1, "dtype": torch.bfloat16}])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust_lr)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(64, 256), (3, 96, 96), (2, 192, 64)])
def test_bfloat16_is_close_to_float64(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    exact, rounded = orthogonalize_(x.clone()), orthogonalize_(x.bfloat16()).double()
    error = (rounded - exact).flatten(-2).norm(dim=-1) / exact.flatten(-2).norm(dim=-1)
    assert 1e-3 < error.max() < 0.04


def test_every_cut_is_one_process_and_bugs_show() -> None:
    for sound, planted in run_ranks(4, cuts_and_bugs, CHOICES):
        assert sound.keys() == {*LAYOUTS, "ddp"}
        assert max(sound.values()) < 1e-10, sound
        assert planted.keys() == {(bug, layout) for bug in PLANTED for layout in LAYOUTS}
        assert min(planted.values()) > 1e-3, planted


def test_collectives_and_memory() -> None:
    """A step has two collectives in total, including AdamW's parameters, and one more for replicas. The memory is as
    predicted."""
    ranks = run_ranks(4, costs)
    assert ranks[0][0] == {
        "fsdp": {"alltoall_base_": 2},
        "hsdp": {"alltoall_base_": 2, "_allgather_base_": 1},
        "tensor": {"alltoall_base_": 2},
        "tensor_fsdp": {"alltoall_base_": 2},
        "tensor_data": {"alltoall_base_": 2, "_allgather_base_": 1},
        "ddp": {"_allgather_base_": 1},
    }
    for layout, (size, replicas) in CELLS.items():
        for limit in BUCKETS:
            expected = update_bytes(WIDE, steps=5, itemsize=2, ranks=size, replicas=replicas, bucket_bytes=limit)
            assert max(peaks[layout, limit] for _, peaks in ranks) == pytest.approx(expected, abs=64), (layout, limit)


def test_owners_share_the_work() -> None:
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3
    shapes = layer * 32
    work = [flops(shape, 5) for shape in shapes]
    sizes = [2 * math.prod(shape) for shape in shapes]
    rounds = assign(work, sizes, 8, 2**28)
    assert Counter(number for round_ in rounds for owned in round_ for number in owned) == Counter(range(len(shapes)))
    loads = [sum(work[number] for round_ in rounds for number in round_[owner]) for owner in range(8)]
    assert max(loads) / min(loads) < 1.02
    assert max(sum(sizes[number] for number in owned) for round_ in rounds for owned in round_) <= 2**28


def test_what_does_not_fit_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 4, 6))
    for shape, matrices in [((3, 4, 6), Matrices()), ((4, 6), Matrices(parts=(2, 3))), ((4,), Matrices())]:
        with pytest.raises(ValueError, match="shape"):
            boxes(shape, matrices)
    with pytest.raises(ValueError, match="shape"):
        Muon([{"params": [weight], "matrices": [Matrices()]}])


def test_planning_needs_no_torch() -> None:
    assert not HEAVY & {name.split(".")[0] for name in reached("trainer.optim.muon.owners")}
