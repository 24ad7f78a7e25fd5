"""One tiny mixture-of-experts model for each family, and the work of a rank that trains all of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from configs.load import load_config
from tests.support.cases import Trained, train

BASE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 32}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**ROUTED, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**ROUTED, **LATENT},
    "dots1": {**ROUTED, "layer_types": ["full_attention", "full_attention"]},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        "moe_layer_start_index": 1,
    },
    "glm4_moe": {**ROUTED, "use_qk_norm": True},
    "gpt_oss": {**LOCAL, "head_dim": 8, "intermediate_size": 32, "sliding_window": 8},
    "granitemoe": LOCAL,
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    },
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "minimax": {**LOCAL, "block_size": 8, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "mixtral": LOCAL,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "phimoe": {**LOCAL, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2_moe": {**EXPERTS, **SHARED},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {
        **{**EXPERTS, **SHARED, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def fields_of(family: str) -> dict[str, Any]:
    return {**BASE, **FAMILIES[family]}


def words_of(family: str, layout: str, *more: str) -> list[str]:
    """Overrides for two steps in float64, with ragged numbers of valid tokens, accumulation and clipping.

    more: further overrides; with model.path the run starts from that folder.
    """
    fields = [f"model.config.{name}={_said(value)}" for name, value in fields_of(family).items()]
    model = ["model=tiny", f"model.config.model_type={family}", *fields]
    if any(word.startswith("model.path=") for word in more):
        model = ["model.weights=pretrained", "data.tokenizer=bytes"]
    words = [*model, f"parallel={layout}", "precision=fp64"]
    words += ["data=synthetic", "data.seq_len=16", "data.ignore_fraction=0.5", "train.global_batch_size=4"]
    words += ["train.gradient_accumulation_steps=2", "train.micro_batch_size=null", "train.clip_grad_norm=0.25"]
    return [*words, "train.steps=2", "optimizer.lr=3e-3", "train.eval_samples=2", *more]


def _said(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


class InFloat64(TorchFunctionMode):
    """Replaces float32 by float64 in model code that computes in float32 at any dtype, mostly routers and norms.

    The float32 rounding would hide smaller errors.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.view:
            # Raw file bytes are viewed as the dtype that the file gives, so keep that dtype.
            return func(*args, **(kwargs or {}))
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = tuple(_wide(value) for value in args)
        return func(*args, **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def train_all(runs: dict[str, list[str]]) -> dict[str, Trained]:
    """Train each run in turn on this rank."""
    found: dict[str, Trained] = {}
    port = int(os.environ["MASTER_PORT"])
    for number, (name, words) in enumerate(runs.items()):
        # A rank may join the next rendezvous before another has left the last one.
        os.environ["MASTER_PORT"] = str(port + number)
        with InFloat64():
            found[name] = train(load_config(words))
    return found
