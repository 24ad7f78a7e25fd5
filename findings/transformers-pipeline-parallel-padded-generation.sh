#!/usr/bin/env bash
# Under transformers' pipeline parallelism a padded batch generates other tokens than in one process.
#
# One would guess: `generate` under `DistributedConfig(pp_size=2)` writes what it writes in one process. So it does for a
# prompt alone, and the logits of a padded batch are exact too.
# What happens: in transformers 5.23 positions and masks of a step are made from the cache's length, and that is the length
# of the first layer's. Each stage keeps the layers of the others as stand-ins that fill no cache, and so on every later stage
# the first layer's is empty for ever. From the second token on, such a stage takes each step for the first one: its mask has
# one column, that of the batch's first position, which is spread over all that are cached. Where that position is padding,
# all of the prompt is hidden. A caller who decodes by hand without `position_ids` gets position 0 for each new token, padding
# or not. Nothing is raised on either path.
# Why it matters: batches of prompts are padded on the left as a rule, and the rows with padding are wrong while the longest
# one is right; an evaluation loses points and no line of a log says why.
# Versions: torch 2.13.0 (CPU, gloo, two ranks), transformers 5.23.0, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/tokens.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None}
if ranks == 1:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))  # so that the layers matter as much as those of a trained model
    model.save_pretrained(folder / "model")
else:
    halves = DistributedConfig(pp_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, distributed_config=halves)
model.eval()
ids = torch.arange(24).reshape(2, 12) * 7 % 60 + 3
seen = torch.ones_like(ids)
ids[0, :3] = seen[0, :3] = 0  # the first prompt is the shorter one
greedy = {"max_new_tokens": 12, "do_sample": False}
found = {}
with torch.no_grad():
    found["logits of the padded prompt"] = model(input_ids=ids, attention_mask=seen).logits[0, 3:]
    found["logits of the other one"] = model(input_ids=ids, attention_mask=seen).logits[1]
    written = model.generate(input_ids=ids, attention_mask=seen, **greedy)
    found["tokens of the padded prompt"], found["tokens of the other one"] = written[:, 12:]
    found["tokens of the first prompt alone"] = model.generate(input_ids=ids[:1, 3:], **greedy)[0, 9:]
    cache = model(input_ids=ids[1:, :8], use_cache=True).past_key_values
    found["a decoded step without position_ids"] = model(input_ids=ids[1:, 8:9], past_key_values=cache).logits
if ranks == 1:
    torch.save(found, folder / "one.pt")
    sys.exit()
wrong = []
for name, expected in torch.load(folder / "one.pt").items():
    same = torch.allclose(found[name], expected)
    wrong += [] if same else [name]
    if dist.get_rank() == 0:
        says = f": {found[name].tolist()}, in one process {expected.tolist()}" if expected.dtype == torch.long else ""
        print(f"{name} {'as in one process' if same else 'DIFFER' + says}")
if dist.get_rank() == 0:
    print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
dist.destroy_process_group()
sys.exit(wrong != ["tokens of the padded prompt", "a decoded step without position_ids"])
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/tokens.py" "$folder" 1 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/tokens.py" "$folder" 2 2>"$folder/log" \
    || { tail -5 "$folder/log"; exit 1; }
