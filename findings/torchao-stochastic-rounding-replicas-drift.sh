#!/usr/bin/env bash
# With torchao's stochastic rounding, the replicas of data parallel training become different models.
#
# One would guess: DistributedDataParallel starts all ranks from the same weights and gives them the same gradients, so that
# they stay equal under any optimizer. `bf16_stochastic_round=True` only changes how a new weight is rounded to bfloat16.
# What happens: torchao 0.18 draws the bits that decide the rounding from the rank's default generator. Ranks that are seeded
# each with their own number, as one does for dropout, round each weight differently from the first step on. Ranks with one
# common seed stay equal until something draws a different number of values on one of them: dropout on batches of different
# lengths is enough. Nothing compares the replicas afterwards; gradients are averaged over models that differ, and a saved
# model is that of rank 0. Here 95% of the weights differ after 200 steps.
# Why it matters: the option is there for training without float32 copies of the weights. Sharded by FSDP it is sound, since
# each weight is rounded on one rank; wherever a weight is held by several ranks (DDP, the replicas of HSDP, norms under tensor
# parallelism) it needs a generator that these ranks share and that nothing else draws from.
# Versions: torchao 0.18.0, torch 2.13.0 (CPU, gloo, two ranks; the step runs uncompiled, so no compiler is needed); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import os
import sys
from importlib.metadata import version

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchao.optim import AdamW8bit

dist.init_process_group("gloo")
RANK = dist.get_rank()


def differing(*, rounding, seed, dropout, rows):
    """Share of the weights that differ between the ranks after 200 steps, and how far they are apart."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(dropout), torch.nn.Linear(64, 8)).bfloat16()
    wrapped = DistributedDataParallel(model)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3, bf16_stochastic_round=rounding)
    torch.manual_seed(seed)
    for step in range(200):
        data = torch.Generator().manual_seed(1000 * step + RANK)
        x = torch.randn(rows(step), 64, generator=data).bfloat16()
        optimizer.zero_grad()
        (wrapped(x) - 2 * x[:, :8]).square().mean().backward()
        optimizer.step()
    mine = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    return (both[0] != both[1]).float().mean().item(), ((both[0] - both[1]).norm() / both[0].norm()).item()


def equal(step):
    return 8


def ragged(step):
    return 8 + RANK * step % 5


cases = {
    "nearest rounding, own seeds, dropout": (False, 1 + RANK, 0.1, ragged),
    "stochastic, one seed, no dropout": (True, 1, 0.0, ragged),
    "stochastic, one seed, dropout, equal batches": (True, 1, 0.1, equal),
    "stochastic, one seed, dropout, ragged batches": (True, 1, 0.1, ragged),
    "stochastic, own seeds, no dropout": (True, 1 + RANK, 0.0, equal),
}
shares = []
for name, (rounding, seed, dropout, rows) in cases.items():
    share, apart = differing(rounding=rounding, seed=seed, dropout=dropout, rows=rows)
    shares.append(share)
    if RANK == 0:
        print(f"{name}: {share:.0%} of the weights differ between the ranks, {apart:.1e} apart")
if RANK == 0:
    print(*(f"{name} {version(name)}" for name in ("torch", "torchao")))
dist.destroy_process_group()
sys.exit(not (max(shares[:3]) == 0 and min(shares[3:]) > 0.5))
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/go.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
