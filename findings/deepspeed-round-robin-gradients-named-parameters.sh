#!/usr/bin/env bash
# With DeepSpeed's round_robin_gradients, a parameter that is asked for by itself comes out as pieces of others.
#
# One would guess: zero_optimization.round_robin_gradients only changes which rank updates which parameter, so that all ranks
# copy gradients to the host at the same time. `safe_get_full_fp32_param` goes on giving the float32 copy of the parameter, and
# `ds_to_universal` files each parameter's values under its name.
# What happens with deepspeed 0.19.8, two ranks, ZeRO 1 or 2: training is right, and the loss is that of a run without it. But
# the record of where each parameter lies in the flat partition is made in the order before the deal, and the partition in the
# order after it. So `safe_get_full_fp32_param` gives elements of other parameters, and the universal form of a checkpoint
# holds them under the wrong names. Nothing is raised, since the lengths fit.
# Why it matters: scripts read weights, gradients and moments through these functions (to log norms, to copy, to save), the
# setting stands in many published configurations for offload, and the universal form is read when the number of ranks changes.
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, two ranks); Python 3.11.
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

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import deepspeed.ops
import torch
from deepspeed.checkpoint.ds_to_universal import main as convert
from deepspeed.utils import safe_get_full_fp32_param

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__ = {}  # joining the group would compile a kernel that training does not call
deepspeed.init_distributed("gloo", verbose=False)
RANK = torch.distributed.get_rank()


def run(stage, deal, place):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 1))
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "round_robin_gradients": deal},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    losses = []
    for step in range(3):
        torch.manual_seed(10 * step + RANK)
        loss = made(torch.randn(4, 16)).square().mean()
        losses.append(float(loss))
        made.backward(loss)
        made.step()
    asked = {name: safe_get_full_fp32_param(p).clone() for name, p in made.module.named_parameters()}
    right = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    made.save_checkpoint(place)
    made.destroy()
    torch.distributed.barrier()
    wrong = [name for name, value in right.items() if not torch.equal(asked[name], value)]
    filed = []
    if RANK == 0:
        given = {"input_folder": f"{place}/global_step3", "output_folder": f"{place}-universal"}
        given |= {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        with contextlib.redirect_stdout(io.StringIO()):
            convert(argparse.Namespace(**given, inject_missing_state=True))
        for name, value in right.items():
            found = torch.load(f"{place}-universal/zero/{name}/fp32.pt", weights_only=False)["param"]
            filed += [] if torch.equal(found.reshape(value.shape), value) else [name]
    torch.distributed.barrier()
    return losses, wrong, filed


results = []
for stage in (1, 2):
    usual = run(stage, False, f"{sys.argv[1]}/usual{stage}")
    dealt = run(stage, True, f"{sys.argv[1]}/dealt{stage}")
    if RANK == 0:
        same = torch.allclose(torch.tensor(usual[0]), torch.tensor(dealt[0]))
        print(f"ZeRO {stage}: the losses are the same: {same}")
        print(f"  wrong without it: asked for by itself {usual[1]}, in the universal form {usual[2]}")
        print(f"  wrong with it:    asked for by itself {dealt[1]}, in the universal form {dealt[2]}")
        results.append(same and not (usual[1] or usual[2]) and bool(dealt[1]) and bool(dealt[2]))
if RANK == 0:
    print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
torch.distributed.destroy_process_group()
sys.exit(not all(results))
PYTHON
cd "$folder"
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/go.py" "$folder" \
    2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
