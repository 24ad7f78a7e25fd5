"""An architecture in miniature: the config of a small model with all the parts of a large one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from trainer.model.build import body_first
from trainer.plan.model_fields import CHOSEN, EXPERTS, MLP, text_part

T = TypeVar("T")
Convert = Callable[[PreTrainedModel], None]


def shrink(config: PretrainedConfig, tp: int, *, whole_depth: bool = False) -> PretrainedConfig:
    """The same architecture with few (or, with `whole_depth`, all) and narrow layers; sizes that `tp` divides stay
    divisible, and others stay indivisible."""
    fields, names = config.to_dict(), config.attribute_map
    # Derived from the other fields, by layers that are not all there.
    fields.pop("per_layer_config", None)

    def get(name: str) -> Any:
        return fields.get(names.get(name, name))

    heads = get("num_attention_heads")
    # Latent attention has its own sizes, and as many key-value heads as heads.
    latent = get("qk_rope_head_dim") is not None
    kv_heads = heads if latent else get("num_key_value_heads") or heads
    small_kv_heads = tp if kv_heads % tp == 0 else kv_heads
    groups = 1 if heads == kv_heads else 2 * max(1, tp // small_kv_heads)
    small_heads, head_dim = small_kv_heads * groups, 16
    sizes = {
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_kv_heads,
        **({} if latent else {"head_dim": head_dim}),
        "hidden_size": small_heads * head_dim,
        "word_embed_proj_dim": small_heads * head_dim,
        "vocab_size": 16 * tp - (1 if get("vocab_size") % tp else 0),
        **dict.fromkeys(MLP, 16 * tp),
        "shared_expert_intermediate_size": 16 * tp,
        "vocab_size_per_layer_input": 16 * tp,
        "hidden_size_per_layer_input": 16,
        **dict.fromkeys(EXPERTS, 4),
        **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
        **dict.fromkeys(CHOSEN, 2),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    }
    small = {names.get(name, name): value for name, value in sizes.items() if get(name) is not None}
    small |= _short(fields)
    # In the real model its width may exceed a whole head here.
    if isinstance(fields.get("rotary_dim"), int):
        small["rotary_dim"] = head_dim // 2
    layers = {} if whole_depth else _few_layers(config, names)
    return type(config)(**{**fields, **small, **layers, **_plain_rotary(fields)})


LARGEST = 200_000_000
"""Maximum parameters of a model that every rank may build on the CPU for a check: 1.6 GB in float64."""


def language_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of this config. transformers builds some only from the composite model's config: their
    class is in the composite's module."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, **options)
    module = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    kinds = [kind for name, kind in vars(module).items() if name.endswith("ForCausalLM")]
    kind = next((kind for kind in kinds if kind.config_class is type(config)), None)
    if kind is None:
        raise ValueError(f"transformers has no causal language model for a {type(config).__name__}")
    return kind._from_config(config, **options)


def small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A model for checks of logits' dependencies. Raises the architecture's own errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        ids = torch.tensor([[3, 4, 5, 6]])
        return first_that_runs(config, 1, lambda model: model(input_ids=ids, use_cache=False))[0].eval()


def _shallow(config: PretrainedConfig) -> PretrainedConfig:
    fields, names = config.to_dict(), config.attribute_map
    fields.pop("per_layer_config", None)
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    small = {"vocab_size": 64, **{name: value for name, value in tokens.items() if fields.get(name) is not None}}
    return type(config)(**{**fields, **small, **_short(fields), **_few_layers(config, names), **_plain_rotary(fields)})


def _short(fields: Mapping[str, Any]) -> dict[str, float]:
    """Without dropout: ranks would draw different numbers, and nothing could be compared. In chunks of few tokens:
    Mamba 2 pads every sequence to whole chunks, of 256."""
    named = ("dropout", "pdrop", "layerdrop")
    noise = [n for n, value in fields.items() if isinstance(value, float) and any(word in n for word in named)]
    return dict.fromkeys(noise, 0.0) | {n: 16 for n in ("chunk_size", "mamba_chunk_size") if fields.get(n)}


def first_that_runs(
    config: PretrainedConfig,
    tp: int,
    run: Callable[[PreTrainedModel], T],
    *,
    convert: Convert | None = None,
    deep: bool = False,
) -> tuple[PreTrainedModel, T]:
    """A random model of this architecture on the CPU that `run` can work with, and its answer. Raises the last error.

    It is narrow with few layers or, if `deep`, with all; if that breaks a rule of the architecture, another variant is
    used. In float64, or in float32 if its code supports no other. convert: changes the model before it gets its values.
    """
    failed: Exception = ValueError("no small config")
    kinds = (partial(shrink, tp=tp), partial(shrink, tp=tp, whole_depth=True), _shallow)
    shapes = [partial(_of_text, kind, config) for kind in kinds]
    for dtype in (torch.float64, torch.float32):
        for make in (shapes[1], shapes[0], shapes[2]) if deep else shapes:
            try:
                model = _random_model(make(), config, dtype, convert)
                return model, run(model)
            except Exception as error:  # a miniature config may break any rule of its architecture
                failed = error
    raise failed


def _of_text(shrunk: Callable[[PretrainedConfig], PretrainedConfig], config: PretrainedConfig) -> PretrainedConfig:
    """In a composite config the language model's part is shrunk."""
    fields, text = config.to_dict(), config.get_text_config()
    part = text_part(fields)
    if text is config or part is None:
        return shrunk(config)
    tokens = {name: 1 for name, value in fields.items() if name.endswith("token_id") and isinstance(value, int)}
    return type(config)(**{**fields, **tokens, part: shrunk(text).to_dict()})


def _random_model(
    small: PretrainedConfig,
    config: PretrainedConfig,
    dtype: torch.dtype,
    convert: Callable[[PreTrainedModel], None] | None,
) -> PreTrainedModel:
    """Random values everywhere: a bias of zero would hide its errors. All parameters are trained."""
    with torch.device("meta"):
        if (size := language_model(small).num_parameters()) > LARGEST:
            raise ValueError(f"its layers are too large to try, {size:,} parameters")
    attention = config._attn_implementation
    model = language_model(
        small, dtype=dtype, attn_implementation=attention if attention in ("sdpa", "eager") else None
    )
    # Packed kernels for experts have no float64.
    model.config._experts_implementation = "eager"
    model.tie_weights()
    body_first(model)
    if convert is not None:
        convert(model)
    # The config's dropout is off already; an adapter has its own, and ranks draw for different parts of the sequence.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            # Only floating-point tensors can have a gradient.
            if parameter.is_floating_point():
                parameter.requires_grad_().add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def _few_layers(config: PretrainedConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """Two layers, and one of each kind if the config lists the layers' kinds."""
    lists = _layer_lists(config)
    chosen = _chosen(config, lists)
    return {
        names.get("num_hidden_layers", "num_hidden_layers"): len(chosen),
        **{name: [value[layer] for layer in chosen] for name, value in lists.items()},
    }


def stand_ins(config: PretrainedConfig) -> list[int]:
    """For each layer of the model the layer of the same kind in its shallow copy."""
    lists = _layer_lists(config)
    chosen, kinds = _chosen(config, lists), _kinds(lists)
    if not kinds:
        return [min(layer, len(chosen) - 1) for layer in range(config.num_hidden_layers)]
    first = {kind: number for number, kind in reversed([*enumerate(kinds[layer] for layer in chosen)])}
    return [chosen.index(layer) if layer in chosen else first[kind] for layer, kind in enumerate(kinds)]


def _layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    count = config.num_hidden_layers
    return {name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == count}


def _kinds(lists: Mapping[str, list[Any]]) -> list[str]:
    return list(map(str, zip(*lists.values(), strict=True)))


def _chosen(config: PretrainedConfig, lists: Mapping[str, list[Any]]) -> list[int]:
    kinds = _kinds(lists)
    return sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, config.num_hidden_layers))))


def _plain_rotary(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Some long-context scalings of rotary embeddings list a factor for each pair of features of a full-size head."""
    kept = ("rope_theta", "partial_rotary_factor")

    def plain(value: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(inner, dict) for inner in value.values()):
            return {name: plain(inner) if isinstance(inner, dict) else inner for name, inner in value.items()}
        if not any(isinstance(inner, list) for inner in value.values()):
            return value
        return {"rope_type": "default", **{name: value[name] for name in kept if name in value}}

    rotary = fields.get("rope_parameters")
    return {"rope_parameters": plain(rotary)} if isinstance(rotary, dict) else {}
