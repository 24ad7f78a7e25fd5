#!/usr/bin/env bash
# LoRA on all linear layers of Gemma 3n gives adapters to layers that are never called: they train nothing.
#
# One would guess: a linear layer that gets a gradient in full training learns through an adapter too, so that
# target_modules="all-linear" leaves nothing out, and every adapter that peft counts as trainable has a gradient.
# What happens: in transformers 5.23 each layer of Gemma 3n has `altup.correction_coefs` and `altup.prediction_coefs`, two
# linear layers. The second is called. Of the first the model's code reads the weight and multiplies by itself. peft 0.21
# wraps both. The wrapper's `weight` is the frozen base weight, its forward is what adds B A x, and nobody calls it: the
# layer is frozen and its adapter has no gradient. Nothing warns.
# Why it matters: what was to be tuned is not, the count of trainable parameters is too high, and DistributedDataParallel,
# which waits for each gradient, fails in step 2. Whether a layer is called cannot be seen in its class: run the model once
# with hooks on its linear layers.
# Versions: torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 \
    numpy==2.4.0 2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/adapters.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3nTextConfig
from transformers.utils import logging

logging.set_verbosity_error()
print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")))
torch.manual_seed(0)
config = Gemma3nTextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4,
    laurel_rank=8,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
    pad_token_id=0,
)
ids = torch.arange(32).reshape(2, 16) % 60 + 3
layers = ("altup.correction_coefs", "altup.prediction_coefs", "mlp.up_proj")


def gradients(model, leaf):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        layer: all(
            p.grad is not None and p.grad.abs().max() > 0
            for name, p in model.named_parameters()
            if layer in name and name.endswith(leaf)
        )
        for layer in layers
    }


model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
full = gradients(model, "weight")
model.zero_grad()
tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
adapted = {layer: sum(layer in name and "lora_B" in name for name, _ in tuned.named_parameters()) for layer in layers}
learns = gradients(tuned, "lora_B.default.weight")
for layer in layers:
    print(f"{layer}: gradient in full training {full[layer]}, adapters {adapted[layer]}, gradient of each {learns[layer]}")
expected = dict(zip(layers, (False, True, True)))
if not (all(full.values()) and all(count == 4 for count in adapted.values()) and learns == expected):
    sys.exit("the behaviour has changed")
print("altup.correction_coefs learns in full training; its adapters never do")
PYTHON
"$folder/venv/bin/python" "$folder/adapters.py"
