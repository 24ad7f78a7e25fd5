"""The work of a rank in a test of token exchange: an experts module divided over all ranks against the whole one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import MixtralConfig, MixtralForCausalLM

from trainer.axes.expert.apply import apply_expert_parallel
from trainer.model.roles import describe
from trainer.plan.views import EXPERT

TOKENS, WIDTH, EXPERTS, CHOSEN = 6, 8, 4, 2


@dataclass
class Apart:
    """Largest differences from the whole module.

    result: output.
    hidden: gradients of the hidden states.
    weights: gradients of the router's weights.
    experts: gradients of this rank's experts.
    views: names of the parameters with the expert view.
    """

    result: float
    hidden: float
    weights: float
    experts: float
    views: list[str]


def exchange_beside_whole(routes: list[list[int]]) -> Apart:
    """Compare the module divided over the ranks with the whole one.

    routes: [tokens, CHOSEN] expert indices, the same on every rank. The tokens differ between ranks.
    """
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        vocab_size=16,
    )
    config._experts_implementation = "eager"
    model = MixtralForCausalLM(config).double()
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    index = torch.tensor(routes)
    hidden = torch.randn(size, len(routes), WIDTH, dtype=torch.float64)
    weights = torch.rand(size, len(routes), CHOSEN, dtype=torch.float64)

    def gradients() -> list[Any]:
        return [experts.gate_up_proj.grad, experts.down_proj.grad]

    whole = [(hidden[r].clone().requires_grad_(), weights[r].clone().requires_grad_()) for r in range(size)]
    expected = [experts(h, index, w) for h, w in whole]
    torch.stack([made.square().sum() for made in expected]).sum().backward()
    full = gradients()
    for parameter in experts.parameters():
        parameter.grad = None
    apply_expert_parallel(model, init_device_mesh("cpu", (size,), mesh_dim_names=("ep",)), tensor=None)
    mine, scores = hidden[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
    made = experts(mine, index, scores)
    made.square().sum().backward()
    parts = [grad.to_local() for grad in gradients()]
    held = [grad.chunk(size)[rank] for grad in full]
    views = sorted(name for name, one in describe(model).items() if one.view == EXPERT)
    dist.destroy_process_group()
    return Apart(
        result=_apart(made, expected[rank]),
        hidden=_apart(mine.grad, whole[rank][0].grad),
        weights=_apart(scores.grad, whole[rank][1].grad),
        experts=max(_apart(a, b) for a, b in zip(parts, held, strict=True)),
        views=views,
    )


def _apart(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    assert a is not None and b is not None
    return (a - b).abs().max().item()
