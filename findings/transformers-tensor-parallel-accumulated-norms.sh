#!/usr/bin/env bash
# Under transformers' tensor parallelism, accumulation counts the first micro-batch 2, 4, 8, ... times for Qwen3's head norms.
#
# One would guess: several backwards before one step add up. That is what gradient accumulation is, and what `.grad` does for
# every other weight of the same model.
# What happens: in transformers 5.23 the plan marks `q_norm` and `k_norm` as whole on every rank and used on this rank's heads,
# so that their gradients have to be summed over the ranks. The sum is taken by a hook behind the accumulation, and so over all
# that has been accumulated: what earlier micro-batches left there has been summed before and is on all ranks, and now counts
# as many times as there are ranks. With R ranks and M micro-batches the first one counts R^(M-1) times: four ranks and eight
# micro-batches make 16384. One micro-batch per step is exact, and so is every other weight.
# Why it matters: checks of a layout take one backward. Qwen3, Gemma 3 and 4 and some twenty more families have such norms; the
# loss looks sane, and the norm of the gradient, by which all gradients are clipped, grows with the number of micro-batches.
# Versions: torch 2.13.0 (CPU, gloo, two ranks), transformers 5.23.0, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/gradients.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config
from transformers.distributed import DistributedConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
if ranks == 1:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=torch.float64)
    model.save_pretrained(folder / "model")
else:
    plan = DistributedConfig(tp_size=ranks, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, distributed_config=plan)
model.train()


def accumulated():
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in gradients.items()}


seen = []
for micro_batch in range(3):
    torch.manual_seed(micro_batch)
    ids = torch.randint(3, 60, (2, 16))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seen.append(accumulated())
if ranks == 1:
    torch.save(seen, folder / "one.pt")
    sys.exit()


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


one = torch.load(folder / "one.pt")
norms = [name for name in one[0] if name.endswith(("q_norm.weight", "k_norm.weight"))]
wrong, others, formula = [], [], []
weighed = {name: torch.zeros_like(one[0][name]) for name in norms}
for index, (found, expected) in enumerate(zip(seen, one)):
    wrong.append(max(apart(found[name], expected[name]) for name in norms))
    others.append(max(apart(found[name], expected[name]) for name in expected if name not in norms))
    for name in norms:  # what was there counts once per rank; this micro-batch counts once
        before = one[index - 1][name] if index else torch.zeros_like(expected[name])
        weighed[name] = ranks * weighed[name] + expected[name] - before
    formula.append(max(apart(found[name], weighed[name]) for name in norms))
    if dist.get_rank() == 0:
        print(f"micro-batches {index + 1}: head norms {wrong[-1]:.0e} from one process, other weights {others[-1]:.0e};", end=" ")
        print(f"head norms {formula[-1]:.0e} from 'earlier ones {ranks} times over'")
if dist.get_rank() == 0:
    print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
dist.destroy_process_group()
sys.exit(not (wrong[0] < 1e-5 and wrong[1] > 0.1 and wrong[2] > wrong[1] and max(others + formula) < 1e-5))
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/gradients.py" "$folder" 1 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/gradients.py" "$folder" 2 2>"$folder/log" \
    || { tail -5 "$folder/log"; exit 1; }
