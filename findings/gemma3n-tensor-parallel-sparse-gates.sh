#!/usr/bin/env bash
# Gemma 3n under transformers' own tensor-parallel plan computes another function than in one process.
#
# One would guess: the plan that a model's config ships (`base_model_tp_plan`) divides it without changing what it
# computes; in float64 two ranks and one process differ by rounding.
# What happens: in transformers 5.23 the plan cuts `mlp.gate_proj` into columns. The layers of Gemma 3n whose
# `activation_sparsity_pattern` is not zero (by default the first ten) then take mean and standard deviation over the
# features of a gate, to keep those above a quantile; each rank takes them over its own half. The two ranks agree with each
# other, the loss looks sane, and it is not the model's. With the sparsity set to zero the same plan is exact.
# Why it matters: nothing fails and nothing warns. What is trained or measured on two GPUs is another model than on one, and
# on four a third. A check of a plan has to use the sparsity of the real config: on dense layers it passes.
# Versions: torch 2.13.0 (CPU, gloo), transformers 5.23.0, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/losses.py" <<'PYTHON'
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Gemma3nTextConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
ids = torch.arange(32).reshape(2, 16) % 60 + 3
losses = {}
for sparsity in (0.0, 0.95):
    saved = folder / f"sparsity-{sparsity}"
    if ranks == 1:
        torch.manual_seed(0)
        config = Gemma3nTextConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[sparsity] * 4,
            laurel_rank=8,
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
            pad_token_id=0,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        model.save_pretrained(saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=ranks, tp_plan="auto")
        )
    with torch.no_grad():
        losses[sparsity] = model(input_ids=ids, labels=ids).loss.item()
if ranks == 1 or dist.get_rank() == 0:
    (folder / f"{ranks}.json").write_text(json.dumps(losses))
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/losses.py" "$folder" 1
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/losses.py" "$folder" 2 2>"$folder/log" \
    || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

one, two = (json.loads(Path(sys.argv[1], f"{ranks}.json").read_text()) for ranks in (1, 2))
print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
apart = {sparsity: abs(two[sparsity] / one[sparsity] - 1) for sparsity in one}
for sparsity in one:
    print(f"sparsity {sparsity}: one process {one[sparsity]:.10f}, two ranks {two[sparsity]:.10f}, apart {apart[sparsity]:.0e}")
sys.exit(not (apart["0.0"] < 1e-6 and apart["0.95"] > 1e-5))
PYTHON
