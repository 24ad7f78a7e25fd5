#!/usr/bin/env bash
# Gemma 3n from its config: one padded position on the left, and nearly all gradients are not a number.
#
# One would guess: padding that the attention mask hides and the labels leave out changes no gradient, on either side.
# What happens: in transformers 5.23 the embedding of the padding token is a row of zeros, as everywhere. On the left it sees
# nothing but itself and stays zero through all layers. Gemma 3n then brings its streams to one size by the root mean square
# of the first; the root has no floor (the one that it is divided by has), so that its derivative at zero is infinite, and
# times a gradient of zero that is NaN. The loss is finite. It is so too where nothing is learnt from the padded places. On
# the right, where padding sees the words before it, all is well; so it is in Gemma 3 and Llama.
# Why it matters: left padding is what preference and reinforcement learning use; a packed sample may begin with the padding
# token where that separates documents. The first loss looks right, and after the first update every weight is NaN.
# Pretrained weights escape where their row for the padding token is not zero.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma3TextConfig, LlamaConfig

sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 8, "num_kv_shared_layers": 0}
own |= {"activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["sliding_attention", "full_attention"]}
configs = {
    "Llama": LlamaConfig(**sizes),
    "Gemma 3": Gemma3TextConfig(**sizes),
    "Gemma 3n": Gemma3nTextConfig(**sizes, **own),
}
batches = {
    "no padding": [3, 5, 7, 9, 11, 13],
    "on the left": [0, 5, 7, 9, 11, 13],
    "on the left, not learnt from": [0, 0, 7, 9, 11, 13],
    "on the right": [3, 5, 7, 9, 11, 0],
}
print("transformers", transformers.__version__, "torch", torch.__version__)
wrong = {}
for name, config in configs.items():
    for place, words in batches.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        ids = torch.tensor([words])
        seen = (ids != 0).long()
        labels = ids.masked_fill(ids == 0, -100)
        if place.endswith("learnt from"):
            labels[0, 2] = -100  # it would be predicted from a padded position
        loss = model(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        wrong[name, place] = sum(bool(grad.isnan().any()) for grad in gradients)
        print(f"{name}, {place}: loss {loss.item():.4f}, NaN in {wrong[name, place]} of {len(gradients)} gradients")
        assert loss.isfinite()
sick = {key for key, count in wrong.items() if count}
sys.exit(sick != {("Gemma 3n", "on the left"), ("Gemma 3n", "on the left, not learnt from")})
PYTHON
"$folder/venv/bin/python" "$folder/go.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
