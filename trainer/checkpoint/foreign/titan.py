"""torchtitan's own names and layout of a Llama's or Qwen3's parameters.

    layers.0.attention.wq.weight       -> model.layers.0.self_attn.q_proj.weight, rows of each head reordered for Llama
    ....attention.qkv_linear.wqkv.weight   -> q_proj, k_proj, v_proj: of each key-value head its queries, key and value
    layers.0.feed_forward.w1.weight    -> model.layers.0.mlp.gate_proj.weight
    layers.0.moe.experts.w1, .w3       -> model.layers.0.mlp.experts.gate_up_proj, one above the other

torchtitan's Llama rotates neighbours (0, 1), (2, 3), ...; transformers rotates a feature with the one half a head
further. The moments of a weight are divided, joined and reordered like the weight.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.errors import CheckpointDamaged, CheckpointMismatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIRST = "tok_embeddings.weight"
NAMES = {
    FIRST: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "moe.router.gate": "mlp.gate",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
NEIGHBOURS = {"llama": True, "qwen3": False, "qwen3_moe": False}
"""Kind of model -> whether torchtitan's rotates neighbours."""
FUSED = "attention.wqkv"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"layers\.(\d+)\.moe\.(?:routed_experts\.inner_)?experts\.w([123])(?:_[A-Z]+)?")

Make = Callable[["Sequence[torch.Tensor]"], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Made:
    """A parameter of the Hugging Face model. theirs: the names of its source tensors. make: the parameter from these
    tensors, and its moments from theirs."""

    theirs: tuple[str, ...]
    make: Make


def same(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def translate(names: Iterable[str], config: PretrainedConfig, folder: Path) -> dict[str, Made]:
    """By the names of the Hugging Face model. Raises CheckpointMismatch for a name that is not of a Llama or Qwen3."""
    made: dict[str, Made] = {}
    experts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        layer, expert = _LAYER.fullmatch(name), _EXPERTS.fullmatch(name)
        part = layer[2].replace("attention.qkv_linear.", "attention.") if layer else ""
        if config.model_type not in NEIGHBOURS or (expert and config.model_type != "qwen3_moe"):
            raise _unknown(name, config, folder)
        if expert:
            experts[expert[1]][expert[2]] = name
        elif layer and part == FUSED:
            for number, projection in enumerate(PROJECTIONS):
                ours = f"model.layers.{layer[1]}.self_attn.{projection}.{layer[3]}"
                made[ours] = Made((name,), partial(_divided, number, ours, config))
        elif layer and part in IN_LAYER:
            ours = f"model.layers.{layer[1]}.{IN_LAYER[part]}.{layer[3]}"
            made[ours] = Made((name,), partial(_reordered, ours, config))
        elif name in NAMES:
            made[NAMES[name]] = Made((name,), same)
        else:
            raise _unknown(name, config, folder)
    for number, found in experts.items():
        if missing := {"1", "2", "3"} - found.keys():
            raise CheckpointDamaged(f"{folder}: expected w{min(missing)} of the experts of layer {number}, found none")
        place = f"model.layers.{number}.mlp.experts"
        made[f"{place}.gate_up_proj"] = Made((found["1"], found["3"]), _one_above_the_other)
        made[f"{place}.down_proj"] = Made((found["2"],), same)
    return made


def _unknown(name: str, config: PretrainedConfig, folder: Path) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{folder}: holds torchtitan's {name} of a {config.model_type}; its own names are read of"
        f" {', '.join(NEIGHBOURS)}: convert the weights with torchtitan's scripts/checkpoint_conversion, and begin from"
        " them"
    )


def _one_above_the_other(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*tensors], dim=1)


def _divided(number: int, ours: str, config: PretrainedConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One of the three projections of a fused one."""
    groups, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    rows = tensors[0].unflatten(0, (groups, queries + 2, -1))
    chosen = rows[:, :queries] if number == 0 else rows[:, queries + number - 1, None]
    return _reordered(ours, config, [chosen.flatten(0, 2)])


def _reordered(ours: str, config: PretrainedConfig, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    (tensor,) = tensors
    query, key = (ours.endswith((f"{name}.weight", f"{name}.bias")) for name in ("q_proj", "k_proj"))
    if not NEIGHBOURS[config.model_type] or not (query or key):
        return tensor
    heads = config.num_attention_heads if query else config.num_key_value_heads
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
