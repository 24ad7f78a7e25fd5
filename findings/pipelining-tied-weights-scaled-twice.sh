#!/usr/bin/env bash
# In torch's V-shaped pipeline schedules, weights that the first and the last stage share are averaged twice.
#
# One would guess: the V of ZBV and DualPipeV puts the first and the last stage on rank 0, so that tied embeddings need no
# exchange between ranks: one parameter serves both, as in one process. `scale_grads=True`, the default, divides what the
# micro-batches have added up by their number.
# What happens: torch 2.13 divides the gradients stage by stage, each when its last backward is done, and goes through the
# stage's parameters. The shared one is in both. The last stage is done first; at that moment its own contribution is there
# and part of the embedding's, and all of it is divided; when the first stage is done, everything is divided again. With N
# micro-batches the head's part of the gradient counts 1/N of what it should. Every other weight is exact, and with
# `scale_grads=False` so is this one.
# Why it matters: the head's part is the larger one by far, and tied embeddings are what small models have, for which these
# schedules are tried first. Nothing is raised, and the loss is right in the first step.
# Versions: torch 2.13.0 (CPU, gloo, two ranks); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

WORDS, WIDTH, MICRO_BATCHES = 16, 8, 4
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(1)
ids, labels = torch.randint(0, WORDS, (8, 5)), torch.randint(0, WORDS, (8, 5))


class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.t()


def pieces(tied):
    torch.manual_seed(0)
    embedding = nn.Embedding(WORDS, WIDTH, dtype=torch.float64)
    middle = [nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh()) for _ in range(2)]
    return [embedding, *middle, Head(embedding.weight if tied else nn.Parameter(embedding.weight.detach().clone()))]


def mean_loss(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def apart(kind, tied, scale):
    whole = pieces(tied)
    mean_loss(nn.Sequential(*whole)(ids), labels).backward()
    parts, mine = pieces(tied), ((0, 3), (1, 2))[rank]
    stages = [PipelineStage(parts[i], i, 4, torch.device("cpu")) for i in mine]
    schedule = kind(stages, MICRO_BATCHES, loss_fn=mean_loss, scale_grads=scale)
    schedule.step(*([ids] if rank == 0 else []), target=labels)
    found = {"shared": 0.0, "others": 0.0}
    for i in mine:
        for p, q in zip(parts[i].parameters(), whole[i].parameters()):
            gradient = p.grad if scale else p.grad / MICRO_BATCHES
            key = "shared" if i in (0, 3) else "others"
            found[key] = max(found[key], ((gradient - q.grad).norm() / q.grad.norm()).item())
    values = torch.tensor(list(found.values()))
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.tolist()


results = []
for kind in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
    for tied in (False, True):
        for scale in (True, False):
            shared, others = apart(kind, tied, scale)
            results.append(others < 1e-6 and (shared > 0.1 if tied and scale else shared < 1e-6))
            if rank == 0:
                says = f"{kind.__name__}, tied={tied}, scale_grads={scale}"
                print(f"{says}: embedding and head {shared:.0e} from one process, others {others:.0e}")
if rank == 0:
    print("torch", torch.__version__)
dist.destroy_process_group()
sys.exit(not all(results))
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/go.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
