#!/usr/bin/env bash
# With reentrant gradient checkpointing, transformers reports the router loss of a mixture of experts and does not train it.
#
# One would guess: gradient checkpointing trades time for memory and changes no gradient, in either of torch's two kinds;
# `gradient_checkpointing_kwargs={"use_reentrant": True}` is the older kind.
# What happens: in transformers 5.23 the router's logits leave the layers by the side, through hooks, and the balancing loss is
# made of them at the end. The reentrant kind runs a layer first without recording, so that what the hooks caught is not
# connected to anything. The loss has its right value and is in the total; its gradient is missing. All gradients are those of a
# coefficient of zero. The newer kind, which is the default, is right.
# Why it matters: `use_reentrant: true` stands in many published configurations of fine-tuning, some of them for mixtures. The
# balancing loss in the log looks as ever, since it is computed; that nothing holds it down shows late, as routers collapse.
# Whatever a library collects by hooks inside a checkpointed layer (router logits, hidden states, attention maps) to make a
# loss of it meets the same.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU, one process); Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/go.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

warnings.simplefilter("ignore")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "output_router_logits": True}
families = {
    "Mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "Qwen3 MoE": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "GPT-OSS": (GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
}
ids = torch.arange(64).reshape(4, 16) * 7 % 60 + 3


def run(family, coefficient, reentrant=None):
    """The total loss, the router loss in it, and all gradients, in float64. reentrant: None without checkpointing."""
    kind, sizes = families[family]
    torch.manual_seed(0)
    config = kind(**SIZES, **sizes, router_aux_loss_coef=coefficient)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    made = model(input_ids=ids, labels=ids, use_cache=False)
    made.loss.backward()
    gradients = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return made.loss.item(), made.aux_loss.item(), torch.cat(gradients)


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


results = []
for family in families:
    (loss, router, right), (_, _, without) = run(family, 0.1), run(family, 0.0)
    for name, reentrant in (("newer", False), ("reentrant", True)):
        got_loss, got_router, got = run(family, 0.1, reentrant)
        same = abs(got_loss - loss) < 1e-9 and abs(got_router - router) < 1e-9
        results.append((same, apart(got, right) < 1e-6, apart(got, without) < 1e-6))
        print(f"{family}, {name} checkpointing: losses equal {same}; gradients {apart(got, right):.0e} from those without", end=" ")
        print(f"checkpointing, {apart(got, without):.0e} from those of a router loss with coefficient 0")
print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
sys.exit(results != [(True, True, False), (True, False, True)] * 3)
PYTHON
"$folder/venv/bin/python" "$folder/go.py" 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
