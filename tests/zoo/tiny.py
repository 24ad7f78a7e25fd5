"""A tiny config of every type that transformers registers for causal language models.

Each starts with the defaults of its config class, so layer kinds, switches and ratios are those of the published model.
Then the fields that determine memory get small values, by name: widths, heads, layers, experts, vocabulary.
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
KEY_VALUE_NAMES = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads")
NOISE = ("dropout", "pdrop", "layerdrop", "jitter")
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
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(LAYER_NAMES, LAYERS),
    **dict.fromkeys(("qk_rope_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_moe_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    "qk_head_dim": HEAD_DIM + 8,
    **dict.fromkeys(("kv_lora_rank", "index_topk", "sliding_window", "attention_window"), 16),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank", "attn_lora_rank", "hc_lowrank", "adapter_rank", "laurel_rank"), 24),
    **dict.fromkeys(
        (
            "linear_head_dim",
            "mamba_headdim",
            "mamba_head_dim",
            "d_head",
            "dim_head",
            "swa_head_dim",
            "indexer_head_dim",
        ),
        HEAD_DIM,
    ),
    **dict.fromkeys(("linear_num_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("mamba_num_heads",), 8),
    **dict.fromkeys(("dim_ff", "dff", "expert_ffn_hidden_size", "mlp_dim"), INNER),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), INNER),
    **dict.fromkeys(
        ("lru_width", "hidden_size_global", "adapter_in_dim", "adapter_out_dim", "adapter_input_size"), HIDDEN
    ),
    **dict.fromkeys(("text_hidden_size", "out_hidden_size", "backbone_hidden_size", "projection_dim"), HIDDEN),
    **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), HIDDEN),
    **dict.fromkeys(("output_channels", "downsample_hidden_size", "shape_embed_dim", "pronunciation_embed_dim"), 32),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size", "encoder_hash_byte_group_vocab"), VOCABULARY),
    **dict.fromkeys(("depth", "num_blocks", "conf_num_hidden_layers"), 2),
    "zero_expert_num": 1,
    **dict.fromkeys(("rel_extent", "sliding_window_size", "attention_window_size"), 16),
    **dict.fromkeys(("n_group", "num_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "image_token_id"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 128),
}

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
WITH_HEADS = {"rope_parameters": PLAIN, "head_dim": HEAD_DIM}
PLAIN_OF_IMAGES = {**PLAIN, "mrope_section": [4, 2, 2]}
ZAMBA = {
    **{"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    **{"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM},
}
QWEN4 = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
    **{"indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 512, "split_ngram_parts": 1},
}
OWN: dict[str, Mapping[str, Any]] = {
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), PLAIN_OF_IMAGES)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_text": {"head_dim": HEAD_DIM + 8},
    # The pad token must not be EOS: at the start of a sequence the pad token has a NaN gradient (0 ** 0.5).
    "gemma3n_text": {"pad_token_id": VOCABULARY - 1},
    "hunyuan_v1_dense": WITH_HEADS,
    "hunyuan_v1_moe": WITH_HEADS,
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": WITH_HEADS,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "rwkv": {"attention_hidden_size": HIDDEN, "intermediate_size": INNER},
    "xlnet": {"d_head": HEAD_DIM},
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": LAYERS},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": {**ZAMBA, "hybrid_layer_ids": [2, 5], "kv_channels": HEAD_DIM, "num_query_groups": HEADS},
}
"""Further fields that a type needs: sizes that are products of others, and values without a default in its class."""


def types() -> list[str]:
    """All types, sorted, including those that share a config class."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def tiny(model_type: str) -> PretrainedConfig:
    made = CONFIG_MAPPING[model_type]()
    return type(made)(**_shrunk(made))


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    fields = config.to_dict()
    small = dict(fields)
    # The published file may spell a field differently from the class. Map its spelling to the class's name.
    own = {written: name for name, written in config.attribute_map.items()}
    for name, value in fields.items():
        part = vars(config).get(name)
        known = name if name in SIZES else own.get(name, name)
        if isinstance(part, PretrainedConfig):
            small[name] = _shrunk(part)
        elif isinstance(value, float) and any(noise in name for noise in NOISE):
            small[name] = 0.0  # ranks draw different noise
        elif known in SIZES:
            small[name] = _small(known, value)
    heads = next((fields[name] for name in HEAD_NAMES if isinstance(fields.get(name), int)), None)
    for name in KEY_VALUE_NAMES:
        if isinstance(fields.get(name), int):
            small[name] = HEADS if fields[name] == heads else min(2, fields[name])
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]  # latent attention rotates this part only
    if fields.get("is_decoder") is False and not fields.get("is_encoder_decoder"):
        small["is_decoder"] = True  # for types that can also be encoders
    return {**small, **_few_layers(fields), **_rotary(fields), **OWN.get(config.model_type, {})}


def _small(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_small(name, one) for one in value]
    whole = isinstance(value, int) and not isinstance(value, bool)
    return min(SIZES.get(name, value), value) if whole and value > 0 else value


def _few_layers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keep enough leading layers to contain every kind of layer, and truncate lists with one entry per layer."""
    count = next((fields[name] for name in LAYER_NAMES if isinstance(fields.get(name), int)), 0)
    lists = {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == count > 1}
    # Ignore lists whose entries all differ (such as layer indices): they do not define kinds of layers.
    kinds = list(map(str, zip(*(value for value in lists.values() if len(set(map(str, value))) < count), strict=True)))
    kept = min(count, max([LAYERS, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    small: dict[str, Any] = {}
    if fields.get("num_kv_shared_layers"):
        kept = min(count, 2 * kept)
        small["num_kv_shared_layers"] = kept // 2
    small |= {name: min(kept, fields[name]) for name in LAYER_NAMES if isinstance(fields.get(name), int)}
    small |= {name: _small(name, value[:kept]) for name, value in lists.items()}
    own = fields.get("per_layer_config")
    if isinstance(own, Mapping):
        small["per_layer_config"] = {
            layer: {name: _of_one_layer(name, value) for name, value in other.items()}
            for layer, other in own.items()
            if int(layer) < kept
        }
    return small


def _of_one_layer(name: str, value: Any) -> Any:
    """Shrink a field of one layer. A head_dim of its own stays different from that of the other layers."""
    if name in KEY_VALUE_NAMES:
        return HEADS
    return 2 * HEAD_DIM if name == "head_dim" else _small(name, value)


def _rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replace rotary scalings that list a factor for each pair of features of a full-size head by the default."""
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
