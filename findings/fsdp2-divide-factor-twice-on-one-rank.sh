#!/usr/bin/env bash
# FSDP2's gradient divide factor counts twice over a mesh of one rank, in float16 and float64 alone.
#
# One would guess: after `set_gradient_divide_factor(4)` the gradient is a quarter of what it was, whatever the dtype and
# however many ranks share the module.
# What happens: torch 2.13 has two ways to divide. In float32 and bfloat16 the collective does it; in other dtypes the
# gradients are divided by one part of the factor before the collective and by the rest behind it, against overflow. A mesh
# of one rank has a shortcut instead of the collective, which divides by the whole factor as well. So float16 and float64
# come out as 1/16, and float32 and bfloat16 as 1/4. A factor of 1, and none, hide it.
# Why it matters: a factor of their own is what modules get whose ranks are fewer than the data's, as experts have; a mesh
# of one rank is where parity is tried first, and float64 is what it is tried in. The same run in float32 is right.
# Versions: torch 2.13.0 (CPU, gloo); Python 3.11. torch 2.11.0 does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

print("torch", torch.__version__)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for factor in (1.0, 4.0):
        layer = torch.nn.Linear(4, 1, bias=False).to(dtype)
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(factor)
        layer(torch.ones(1, 4, dtype=dtype)).sum().backward()  # the gradient of a sum of inputs of one is one
        found[dtype, factor] = layer.weight.grad.to_local()[0, 0].item()
        print(f"{dtype}, factor {factor:g}: gradient {found[dtype, factor]:g}, should be {1 / factor:g}")
dist.destroy_process_group()
right = [found[dtype, factor] == 1 / factor for dtype, factor in found if factor == 1 or dtype.itemsize == 4]
right.append(found[torch.bfloat16, 4.0] == 0.25)
twice = [found[dtype, 4.0] == 1 / 16 for dtype in (torch.float16, torch.float64)]
sys.exit(not (all(right) and all(twice)))
PYTHON
