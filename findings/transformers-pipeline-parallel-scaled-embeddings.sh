#!/usr/bin/env bash
# Under transformers' pipeline parallelism Granite multiplies its hidden state by the embedding's factor on every stage.
#
# One would guess: `DistributedConfig(pp_size=2)` gives each rank half of the layers and computes what one process computes;
# Granite's config ships a plan for it.
# What happens: in transformers 5.23 a later stage runs the whole model's forward, with what it has received as
# `inputs_embeds`. Whatever that forward does to embeddings before the first layer, it does again on each stage. Granite
# multiplies them by `embedding_multiplier` (12 in Granite 3). Where the two ranks meet, the hidden state becomes 12 times as
# large and what the second half adds to it a twelfth as important: other logits, and other tokens. Nothing is raised. Llama
# has nothing in that place and is exact, and so is Gemma 2, whose factor sits in the embedding layer.
# Why it matters: the text stays fluent enough to pass for a weak model. The same lines stand in GraniteMoE, its shared,
# hybrid and sliding-window variants, HyperCLOVA X and HRM. A pipeline that hands activations over as embeddings has to be
# checked per family, with the multipliers of the real config: with a factor of 1 this one passes.
# Versions: torch 2.13.0 (CPU, gloo, two ranks), transformers 5.23.0, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/logits.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}
factors = {"residual_multiplier": 0.22, "attention_multiplier": 0.125, "logits_scaling": 4.0}
configs = {
    "Llama": LlamaConfig(**sizes),
    "Gemma 2": Gemma2Config(**sizes, head_dim=8),
    "Granite, factor 1": GraniteConfig(**sizes, **factors, embedding_multiplier=1.0),
    "Granite, factor 12": GraniteConfig(**sizes, **factors, embedding_multiplier=12.0),
}
ids = torch.arange(16).reshape(1, 16) * 7 % 60 + 3
seen = {}
for name, config in configs.items():
    if ranks == 1:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))  # so that the layers matter as much as those of a trained model
        model.save_pretrained(folder / name)
    else:
        halves = DistributedConfig(pp_size=ranks)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64, distributed_config=halves)
    with torch.no_grad():
        seen[name] = model.eval()(input_ids=ids).logits
if ranks == 1:
    torch.save(seen, folder / "one.pt")
    sys.exit()
apart, words = {}, {}
for name, expected in torch.load(folder / "one.pt").items():
    apart[name] = ((seen[name] - expected).norm() / expected.norm()).item()
    words[name] = (seen[name].argmax(-1) == expected.argmax(-1)).double().mean().item()
    if dist.get_rank() == 0:
        print(f"{name}: logits {apart[name]:.0e} from one process, the same most likely token at {words[name]:.0%} of the places")
if dist.get_rank() == 0:
    print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
dist.destroy_process_group()
wrong = apart.pop("Granite, factor 12")
sys.exit(not (wrong > 0.01 and max(apart.values()) < 1e-5))
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/logits.py" "$folder" 1 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/logits.py" "$folder" 2 2>"$folder/log" \
    || { tail -5 "$folder/log"; exit 1; }
