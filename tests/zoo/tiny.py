"""A tiny config of every type that transformers registers for causal language models.

Each begins as its config class makes it, so that layer kinds, switches and ratios are those of the published model;
then what costs memory is set to small sizes by name: widths, heads, layers, experts, vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, HEADS, HEAD_DIM, INNER, VOCABULARY, LAYERS = 64, 4, 16, 96, 261, 4

LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
HEAD_NAMES = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
SIZES = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "dim", "emb_dim"), HIDDEN
    ),
    **dict.fromkeys(HEAD_NAMES, HEADS),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv", "global_head_dim", "kv_channels"), HEAD_DIM),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), INNER
    ),
    **dict.fromkeys(
        ("n_inner", "d_inner", "shared_expert_intermediate_size", "shared_intermediate_size", "d_ff"), INNER
    ),
    **dict.fromkeys(("ffn_hidden_size", "mlp_hidden_size"), INNER),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(LAYER_NAMES, LAYERS),
    **dict.fromkeys(("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_moe_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("kv_lora_rank", "index_topk", "sliding_window", "attention_window"), 16),
    "q_lora_rank": 24,
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "image_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 128),
}

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
PLAIN_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
OWN: dict[str, Mapping[str, Any]] = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": PLAIN_ROTARY,
    "hunyuan_v1_moe": PLAIN_ROTARY,
}
"""What a type needs besides: sizes that are products of others, and values that its class leaves open."""


def types() -> list[str]:
    """Sorted; of those that share a config class, each."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny(model_type: str) -> PretrainedConfig:
    made = CONFIG_MAPPING[model_type]()
    fields = _shrunk(made.to_dict(), made.attribute_map)
    fields.update(OWN.get(model_type, {}))
    return type(made)(**fields)


def _shrunk(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    small = dict(fields)
    for name, value in fields.items():
        if isinstance(value, Mapping) and ("model_type" in value or name.endswith("_config")):
            small[name] = _shrunk(value, {})
        elif isinstance(value, float) and ("dropout" in name or "pdrop" in name or name == "layerdrop"):
            small[name] = 0.0  # ranks draw other numbers
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(SIZES[name], value) if value > 0 else value
    key_value = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
    heads = next((fields[name] for name in HEAD_NAMES if isinstance(fields.get(name), int)), None)
    for name in key_value:
        if isinstance(fields.get(name), int):
            small[name] = HEADS if fields[name] == heads else min(2, fields[name])
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]  # latent attention turns this part alone
    return {**small, **_few_layers(fields), **_rotary(fields)}


def _few_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The first layers, as many as show every kind; what has an entry for each layer is cut to them."""
    count = next((fields[name] for name in LAYER_NAMES if isinstance(fields.get(name), int)), 0)
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == count > 1}
    kinds = list(map(str, zip(*lists.values(), strict=True)))
    kept = min(count, max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    small: dict[str, Any] = {}
    if fields.get("num_kv_shared_layers"):
        kept = min(count, 2 * kept)
        small["num_kv_shared_layers"] = kept // 2
    small |= {name: min(kept, fields[name]) for name in LAYER_NAMES if isinstance(fields.get(name), int)}
    small |= {name: value[:kept] for name, value in lists.items()}
    own = fields.get("per_layer_config")
    if isinstance(own, Mapping):
        small["per_layer_config"] = {
            layer: {
                name: 2 * SIZES[name] if name == "head_dim" else SIZES.get(name, value) for name, value in other.items()
            }
            for layer, other in own.items()
            if int(layer) < kept
        }
    return small


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Some scalings list a factor for each pair of features of a full-size head."""
    rotary = fields.get("rope_parameters")
    if not isinstance(rotary, dict):
        return {}
    kept = ("rope_theta", "partial_rotary_factor")

    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if any(isinstance(inner, dict) for inner in value.values()):
            return {name: plain(inner) for name, inner in value.items()}
        if any(isinstance(inner, list) for inner in value.values()):
            return {"rope_type": "default", **{name: value[name] for name in kept if name in value}}
        return value

    return {"rope_parameters": plain(rotary)}
