#!/usr/bin/env bash
# A learning rate that is a tensor is one tensor for all parameter groups of a torch optimizer, and schedulers write into it.
#
# One would guess: `lr=torch.tensor(0.1)` is `lr=0.1` in another type. It is what fused, capturable and compiled optimizers
# take, so that a change of the rate does not compile again. Each parameter group has a rate of its own.
# What happens: in torch 2.13 all groups that give no rate hold the same tensor, and schedulers fill it in place. Whatever goes
# through the groups in turn then acts once for each: ReduceLROnPlateau with factor 0.1 and two groups (weights that decay, and
# those that do not) divides by 100; `group["lr"] *= 0.5` in a loop halves twice; LambdaLR, MultiplicativeLR and OneCycleLR with
# one value for each group give all groups the last one's. Schedulers that read all rates before they write and treat all groups
# alike (cosine, linear, exponential) are right, and so the tensor passes the usual check. Nothing is raised.
# Why it matters: one turns the rate into a tensor for speed, without a thought for the schedule. Two reductions on a plateau
# then leave a ten-thousandth of the rate, and factors per layer are lost. A tensor of its own in each group
# (`{"params": ..., "lr": torch.tensor(0.1)}`) is right.
# Versions: torch 2.13.0 (CPU, one process); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import sys

import torch
from torch.optim import lr_scheduler


class ByHand:
    """What scripts do themselves at the end of an epoch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5


def unchanged(_):
    return 1.0


def half(_):
    return 0.5


schedules = {
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.1, min_lr=0.0, eps=0.0),
    "group['lr'] *= 0.5": ByHand,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [half, unchanged]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.01], total_steps=10),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [half, unchanged]),
}


def rates(make, kind):
    """The rates of both groups after two steps. kind: number, tensor, or a tensor in each group."""
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    given = {"lr": 0.1 if kind == "number" else torch.tensor(0.1, dtype=torch.float64)}
    groups = [{"params": [p]} | ({"lr": torch.tensor(0.1, dtype=torch.float64)} if kind == "own" else {}) for p in parameters]
    optimizer = torch.optim.AdamW(groups, **given, fused=True)
    schedule = make(optimizer)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones(4)
        optimizer.step()
        schedule.step(*([1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    return [round(float(group["lr"]), 6) for group in optimizer.param_groups]


wrong = []
for name, make in schedules.items():
    number, tensor, own = (rates(make, kind) for kind in ("number", "tensor", "own"))
    assert own == number, name
    wrong += [] if tensor == number else [name]
    print(f"{name}: rates of two groups after two steps {number}, with a tensor {tensor}")
print("torch", torch.__version__)
sys.exit(wrong != list(schedules)[3:])
PYTHON
"$folder/venv/bin/python" "$folder/go.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
