#!/usr/bin/env bash
# In transformers' Trainer a mixture's router loss counts once per micro-batch, and with label smoothing not at all.
#
# One would guess: `router_aux_loss_coef` is the weight of the balancing loss in the total. The same eight rows give the same
# update whether they come as one batch or as eight micro-batches of one row, as they do for a dense model, and
# `label_smoothing_factor` changes only the language loss.
# What happens: in transformers 5.23 the Trainer has the model divide its language loss by the number of tokens of the whole
# step, so that micro-batches add up. The model then adds the router loss of the micro-batch, undivided, and the Trainer
# divides no more. With M micro-batches the router loss counts M times. With label smoothing the Trainer takes the labels away
# and computes the language loss itself; the model adds its router loss to a loss that it has not got, and so it is dropped.
# Why it matters: coefficients are small and tuned, and 64 micro-batches make 0.02 a weight of 1.28; two runs that differ only
# in how the batch is divided train other routers. The loss in the log rises with M, which one reads as worse training. (The
# tracker of transformers has the like for the number of processes, which multiplies again: issue 48690.)
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0 (CPU, one process); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "output_router_logits": True}
row = torch.arange(16) * 7 % 60 + 3
ROWS = [{"input_ids": row, "labels": row}] * 8  # equal rows: each micro-batch has the router loss of the whole batch


def update(coefficient, micro_batches, smoothing=0.0):
    """The change of all weights in one step of plain gradient descent, in float64; the loss in the log."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, router_aux_loss_coef=coefficient)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    step = {"per_device_train_batch_size": 8 // micro_batches, "gradient_accumulation_steps": micro_batches, "max_steps": 1}
    rule = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    rest = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    given = TrainingArguments(sys.argv[1], **step, **rule, **rest, label_smoothing_factor=smoothing)
    loss = Trainer(model, given, train_dataset=ROWS).train().training_loss
    return before - torch.cat([p.detach().flatten() for p in model.parameters()]), loss


once, base = update(0.02, 1)[0], update(0.0, 1)[0]
router = once - base
found = []
for micro_batches, smoothing in ((1, 0.0), (2, 0.0), (4, 0.0), (8, 0.0), (1, 0.1), (8, 0.1)):
    (with_it, loss), (without, _) = (update(c, micro_batches, smoothing) for c in (0.02, 0.0))
    times = (torch.dot(with_it - without, router) / router.square().sum()).item()
    dense = 0.0 if smoothing else ((without - base).norm() / base.norm()).item()
    found.append((micro_batches, smoothing, times, dense))
    sys.stderr.flush()
    print(f"micro-batches {micro_batches}, smoothing {smoothing}: the router loss counts {times:.4f} times; loss {loss:.4f}")
print("without a router loss, the updates of 1 to 8 micro-batches differ by", f"{max(d for *_, d in found):.0e}")
print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate")))
expected = [0.0 if smoothing else micro_batches for micro_batches, smoothing, *_ in found]
right = all(abs(times - wanted) < 1e-6 for (_, _, times, _), wanted in zip(found, expected))
sys.exit(not (right and all(dense < 1e-6 for *_, dense in found)))
PYTHON
"$folder/venv/bin/python" "$folder/go.py" "$folder/out" 2>"$folder/log" | grep -v train_runtime || { tail -5 "$folder/log"; exit 1; }
