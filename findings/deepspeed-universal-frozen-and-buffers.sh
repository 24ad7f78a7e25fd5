#!/usr/bin/env bash
# DeepSpeed's load_universal restores neither frozen parameters nor buffers, and says nothing.
#
# One would guess: a checkpoint that `ds_to_universal` has converted holds the whole model, as the one that it was made of, so
# that a run goes on from it with the weights and buffers that it had.
# What happens with deepspeed 0.19.8, under ZeRO 2 and 3 alike: trained parameters come back; a parameter that is frozen keeps
# the value that the new process has drawn for it, and so does a persistent buffer (a running mean). `load_checkpoint` gives
# its path as for a success. An ordinary checkpoint restores all three. Under ZeRO 2 the values even lie in the converted
# folder, in its *_model_states.pt; nobody reads them there.
# Why it matters: adapters on a frozen model, frozen embeddings, batch norms, and any model whose script draws the frozen part
# itself. The universal form is the way to another number of ranks, where one compares the next loss least.
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
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29715"}
import deepspeed
import deepspeed.ops
import torch
from deepspeed.checkpoint.ds_to_universal import main as convert

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__ = {}  # joining the group would compile a kernel that training does not call
deepspeed.init_distributed("gloo", verbose=False)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained = torch.nn.Linear(16, 16), torch.nn.Linear(16, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.randn(16))

    def forward(self, x):
        return self.trained(torch.tanh(self.frozen(x - self.mean)))


def engine(stage, seed, *, universal=False):
    torch.manual_seed(seed)
    model = Model()
    settings = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW(model.trained.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def values(made):
    with deepspeed.zero.GatheredParameters(list(made.module.parameters())):
        named = [*made.module.named_parameters(), *made.module.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}


def restored(expected, made):
    found = values(made)
    made.destroy()
    same = {name: torch.equal(found[name], tensor) for name, tensor in expected.items()}
    return same["trained.weight"], same["frozen.weight"], same["mean"]


def run(stage, place):
    made = engine(stage, 0)
    for _ in range(2):
        made.backward(made(torch.randn(8, 16)).square().mean())
        made.step()
    made.save_checkpoint(place)
    expected = values(made)
    made.destroy()
    given = {"input_folder": f"{place}/global_step2", "output_folder": f"{place}-universal/global_step2"}
    given |= {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with contextlib.redirect_stdout(io.StringIO()):
        convert(argparse.Namespace(**given, inject_missing_state=True))
    usual = engine(stage, 1)
    assert usual.load_checkpoint(place)[0] is not None
    usual = restored(expected, usual)
    other = engine(stage, 1, universal=True)
    assert other.load_checkpoint(f"{place}-universal", tag="global_step2")[0] is not None
    return usual, restored(expected, other)


print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
print("restored: a trained weight, a frozen weight, a buffer")
results = []
for stage in (2, 3):
    usual, universal = run(stage, f"{sys.argv[1]}/zero{stage}")
    print(f"ZeRO {stage}: load_checkpoint {usual}, load_universal {universal}")
    results.append(usual == (True, True, True) and universal == (True, False, False))
sys.exit(not all(results))
PYTHON
cd "$folder"
"$folder/venv/bin/python" "$folder/go.py" "$folder" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
