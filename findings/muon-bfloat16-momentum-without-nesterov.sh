#!/usr/bin/env bash
# torch's Muon without Nesterov overwrites the momentum of bfloat16 parameters.
#
# One would guess: after step 1 the momentum buffer is (1 - momentum) times the gradient, whatever the dtype, and with
# `nesterov=False` the buffer is what gets orthogonalised, on a copy.
# What happens: the iteration of torch 2.13 begins with a cast to bfloat16, which is a copy for float32 and the very same
# tensor for bfloat16, and then divides in place by the Frobenius norm. The buffer itself is normalised: after every step it
# has norm 1. What the optimizer remembers no longer shrinks with its gradients: with gradients of norm 1000 it forgets its
# past in one step, with gradients of norm 0.001 it hardly takes in a new one. With Nesterov the buffer is interpolated
# first, into a tensor of its own, and stays right.
# Why it matters: bfloat16 parameters are what "pure bfloat16" training has, the switch is documented, the loss goes down all
# the same, and the float32 run that one compares with behaves otherwise.
# Versions: torch 2.13.0 (CPU); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
torch.manual_seed(0)
gradients = [1000 * torch.randn(8, 16), 1000 * torch.randn(8, 16)]
expected = torch.zeros(8, 16)
for gradient in gradients:
    expected = 0.95 * expected + 0.05 * gradient
apart = {}
for dtype in (torch.float32, torch.bfloat16):
    for nesterov in (True, False):
        weight = torch.nn.Parameter(torch.ones(8, 16, dtype=dtype))
        optimizer = torch.optim.Muon([weight], lr=1e-3, momentum=0.95, nesterov=nesterov, weight_decay=0.0)
        for gradient in gradients:
            weight.grad = gradient.to(dtype)
            optimizer.step()
        kept = optimizer.state[weight]["momentum_buffer"].float()
        apart[dtype, nesterov] = ((kept - expected).norm() / expected.norm()).item()
        print(f"{dtype}, nesterov={nesterov}: norm of the momentum {kept.norm():.3f}, should be {expected.norm():.3f}")
wrong = apart.pop((torch.bfloat16, False))
sys.exit(not (wrong > 0.5 and max(apart.values()) < 0.02))
PYTHON
