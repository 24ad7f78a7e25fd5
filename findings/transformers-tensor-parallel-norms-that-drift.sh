#!/usr/bin/env bash
# GLM-4.5's head norms become another weight on each rank when transformers trains it tensor parallel.
#
# One would guess: the plan that a model's config ships divides it for training as well; weights that every rank holds whole
# get the same gradient everywhere, and stay equal.
# What happens: in transformers 5.23 the plan of Qwen3 marks `q_norm` and `k_norm`, which are whole on every rank and see this
# rank's heads alone, so that their gradients are summed over the ranks. GLM-4.5 (`glm4_moe`) has the same norms where its
# config says `use_qk_norm`, and its plan leaves them out. The loss is exact and so are all other gradients; but each rank's
# norms take the gradient of its own heads. After one step of AdamW the ranks hold different weights where the model has one,
# and a saved model gets those of rank 0. Nothing is raised and nothing warns.
# Why it matters: GLM-4.5 of 355 billion parameters has the switch on and its Air sibling has it off, so that a check on the
# sibling passes. A check of a plan has to compare gradients, rank by rank, with every switch as the real config has it.
# Versions: torch 2.13.0 (CPU, gloo, two ranks), transformers 5.23.0, accelerate 1.15.0; Python 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.0 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
cat >"$folder/train.py" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config
from transformers.distributed import DistributedConfig
from transformers.utils import logging

warnings.simplefilter("ignore")
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
configs = {
    "Qwen3": Qwen3Config(**sizes, head_dim=8),
    "GLM-4.5": Glm4MoeConfig(**sizes, **experts, head_dim=8, use_qk_norm=True, n_group=1, topk_group=1),
}
exactly = {"dtype": torch.float64, "experts_implementation": "eager"}  # the other ones have no kernel for float64
ids = torch.arange(32).reshape(2, 16) * 7 % 60 + 3
seen = {}
for name, config in configs.items():
    if ranks == 1:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, **exactly)
        model.save_pretrained(folder / name)
    else:
        plan = DistributedConfig(tp_size=ranks, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder / name, **exactly, distributed_config=plan)
    loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in gradients.items()}
    norms = [p for n, p in model.named_parameters() if n.endswith(("q_norm.weight", "k_norm.weight"))]
    torch.optim.AdamW(norms, lr=1e-3).step()
    seen[name] = loss.item(), gradients, torch.cat([p.detach().flatten() for p in norms])
if ranks == 1:
    torch.save(seen, folder / "one.pt")
    sys.exit()


def apart(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


results = []
for name, (expected_loss, expected, _) in torch.load(folder / "one.pt").items():
    loss, found, stepped = seen[name]
    wrong = {n: apart(found[n], g) for n, g in expected.items() if g.norm() > 0}
    heads = max(value for n, value in wrong.items() if n.endswith(("q_norm.weight", "k_norm.weight")))
    others = max(value for n, value in wrong.items() if not n.endswith(("q_norm.weight", "k_norm.weight")))
    copies = [torch.empty_like(stepped) for _ in range(ranks)]
    dist.all_gather(copies, stepped)
    drift = (copies[0] - copies[1]).abs().max().item()
    results.append((abs(loss - expected_loss) < 1e-5, others < 1e-5, heads < 1e-5, drift == 0))
    if dist.get_rank() == 0:
        print(f"{name}: loss {abs(loss - expected_loss):.0e} from one process, gradients of head norms {heads:.0e}, others", end=" ")
        print(f"{others:.0e}; after one step the ranks' norms are up to {drift:.0e} from each other")
if dist.get_rank() == 0:
    print(*(f"{name} {version(name)}" for name in ("torch", "transformers")))
dist.destroy_process_group()
sys.exit(results != [(True, True, True, True), (True, True, False, False)])
PYTHON
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/train.py" "$folder" 1 2>"$folder/log" || { tail -5 "$folder/log"; exit 1; }
"$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 "$folder/train.py" "$folder" 2 2>"$folder/log" \
    || { tail -5 "$folder/log"; exit 1; }
