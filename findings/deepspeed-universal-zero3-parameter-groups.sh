#!/usr/bin/env bash
# A DeepSpeed universal checkpoint, read under ZeRO 3 by a run with two parameter groups, changes what AdamW does.
#
# One would guess: converted by `ds_to_universal` and read with `load_universal`, a run goes on as it would have: each group
# with its own weight decay, and the count of updates (the bias correction of AdamW) at the saved number. Under ZeRO 2 it is so.
# What happens under ZeRO 3 with deepspeed 0.19.8: every group gets the settings of the first one, so that weights which were
# to be left alone (norms, biases, with weight decay 0) decay from then on; and the count of updates is one tensor that the
# states of all groups share, so that each update counts once per group. After 2 saved and 2 further updates it says 6, not 4.
# Nothing is printed, and the loss goes down.
# Why it matters: two groups are what transformers' Trainer and most scripts make, and the universal form is the way to go on
# with another number of ranks, when one least compares the next loss.
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, one rank); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.0 deepspeed==0.19.8 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import argparse
import contextlib
import io
import logging
import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713"}
import deepspeed
import torch
from deepspeed.checkpoint.ds_to_universal import main as convert

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.init_distributed("gloo", verbose=False)


def engine(stage, *, universal):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in named if name.endswith("weight")], "weight_decay": 0.1},
        {"params": [named[name] for name in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    settings = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "wall_clock_breakdown": False,
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings)
    return made


def train(made, steps):
    for step in steps:
        torch.manual_seed(100 + step)
        made.backward(made(torch.randn(8, 16)).square().mean())
        made.step()


def seen(made):
    inner = made.optimizer.optimizer
    counts = sorted({int(state["step"]) for state in inner.state.values()})
    return [group["weight_decay"] for group in inner.param_groups], counts


def run(stage, place):
    made = engine(stage, universal=False)
    train(made, range(2))
    made.save_checkpoint(place)
    train(made, range(2, 4))
    expected = seen(made)
    made.destroy()
    step = f"{place}/global_step2"
    with contextlib.redirect_stdout(io.StringIO()):
        convert(
            argparse.Namespace(
                input_folder=step,
                output_folder=f"{place}-universal/global_step2",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    made = engine(stage, universal=True)
    made.load_checkpoint(f"{place}-universal", tag="global_step2")
    train(made, range(2, 4))
    found = seen(made)
    made.destroy()
    return expected, found


print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
results = {}
for stage in (2, 3):
    expected, found = results[stage] = run(stage, f"{sys.argv[1]}/zero{stage}")
    print(f"ZeRO {stage}, gone on at once:  weight decay {expected[0]}, updates counted {expected[1]}")
    print(f"ZeRO {stage}, through the form: weight decay {found[0]}, updates counted {found[1]}")
right = all(sorted(set(expected[0])) == [0.0, 0.1] and expected[1] == [4] for expected, _ in results.values())
still = results[2][1] == results[2][0] and 0.0 not in results[3][1][0] and results[3][1][1] == [6]
sys.exit(not (right and still))
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/go.py" "$folder" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
