"""Fields of a Hugging Face config that are needed before transformers is imported, under one name each. Torch-free.

Architectures spell the same size differently (`hidden_size`, GPT-2's `n_embd`). A composite config, of a model that
also reads images or sound, keeps its language model's sizes in a nested config, `text_config`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from configs.schema import Config, Model

TEXT_PARTS = ("text_config", "decoder", "generator", "thinker_config", "llm_config")
"""Names that transformers' `get_text_config` and remote code use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes of the language model; None if the fields do not give them."""

    hidden: int | None
    layers: int | None
    heads: int | None
    key_value_heads: int | None
    vocabulary: int | None
    positions: int | None


NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "vocabulary": ("vocab_size",),
    "positions": ("n_positions", "max_position_embeddings"),
}


def config_fields(config: Config) -> dict[str, Any]:
    """Known fields of the language model's Hugging Face config: preset or folder, then overrides.

    A hub id is not looked up: planning needs no network. A file without a config counts as empty; `model` reports the
    problem.
    """
    fields: dict[str, Any] = dict(config.model.architecture)
    if config.model.path is not None:
        file = Path(config.model.path).expanduser() / "config.json"
        try:
            found = json.loads(file.read_text()) if file.is_file() else {}
        except (OSError, ValueError):
            found = {}
        fields = found if isinstance(found, dict) else {}
    return text_fields(merged(fields, config.model.config))


def merged(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` merged into `fields`. A size that a composite config keeps in its `text_config` goes there; a group
    of fields changes only the fields that it names."""
    result = dict(fields)
    part = text_part(fields)
    for name, value in overrides.items():
        if part is not None and name not in fields and name in fields[part]:
            result[part] = {**result[part], name: value}
        elif isinstance(value, Mapping) and isinstance(result.get(name), Mapping) and name in (part, *TEXT_PARTS):
            result[name] = {**result[name], **value}
        else:
            result[name] = value
    return result


def text_part(fields: Mapping[str, Any]) -> str | None:
    """Name of the field that holds the language model's own config; None for a language model's config."""
    return next((name for name in TEXT_PARTS if isinstance(fields.get(name), Mapping)), None)


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields of a possibly composite config."""
    part = text_part(fields)
    return {**fields, **text_fields(fields[part])} if part else dict(fields)


def sizes(fields: Mapping[str, Any]) -> Sizes:
    """The language model's sizes in these fields."""
    text = text_fields(fields)
    found = {size: next((text[name] for name in names if text.get(name)), None) for size, names in NAMES.items()}
    return Sizes(**{size: value if isinstance(value, int) and value > 0 else None for size, value in found.items()})


def attention_width(fields: Mapping[str, Any]) -> int:
    """Number of heads times head size, which determines the work of attention. fields: of the language model. If
    queries and keys differ in size from values (DeepSeek's latent attention), the mean of the two."""
    known = sizes(fields)
    heads = known.heads or 1
    if fields.get("qk_nope_head_dim") and fields.get("v_head_dim"):
        return heads * (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"] + fields["v_head_dim"]) // 2
    return heads * head_width(fields)


def head_width(fields: Mapping[str, Any]) -> int:
    """The size of one attention head. fields: of the language model."""
    known = sizes(fields)
    return int(fields.get("head_dim") or (known.hidden or 1) // (known.heads or 1))


KINDS = ("layer_types", "layers_block_type", "attention_layers")
"""Names of the field that lists the layers' kinds."""
ATTENTION = {
    "attention": None,
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "global": None,
    "local": "window_size",
}
"""Kinds of layers whose work grows with the sequence's length, by their names in configs, with the field that gives
their window."""


def attention_spans(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Maximum number of tokens that a token sees, itself included, per attention layer; None: all up to itself.

    fields: of the language model's config, including defaults of its class.
    """
    kinds = next((fields[name] for name in KINDS if fields.get(name)), ())
    if not kinds:
        # Without a list of kinds a window applies to every layer (Mistral).
        return (fields.get("sliding_window") or None,) * (sizes(fields).layers or 0)
    windows = (ATTENTION[kind] for kind in kinds if kind in ATTENTION)
    return tuple(fields.get(window) or None if window else None for window in windows)


def keys_seen(spans: Iterable[int | None], seq_len: int) -> int:
    """Keys of one token, summed over all layers, without the causal mask: the last token sees the whole window or
    sequence."""
    return sum(seq_len if span is None else min(span, seq_len) for span in spans)


COUNTS = ("hidden", "layers", "heads", "key_value_heads", "vocabulary")
MLP = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
"""Names of the MLP's feature size."""
WIDTHS = (*MLP, "head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_moe_experts", "moe_num_experts")
"""Names of the number of routed experts per layer."""
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""Names of the number of experts per token."""
MOST_LAYERS = 10_000
"""More are a typing error, and building them takes minutes."""
DROPPED = ("dropout", "dropout_prob", "pdrop", "layerdrop")
"""Suffixes of dropout probabilities, for values or layers."""


def check_sizes(fields: Mapping[str, Any], model: Model) -> Iterator[str]:
    """One line for each impossible size. fields: of the language model, as far as known."""
    known = [name for names in (*(NAMES[count] for count in COUNTS), WIDTHS) for name in names]
    for name in known:
        # Some configs have a list with an entry per layer.
        value = fields.get(name)
        if value is None or isinstance(value, list):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            yield f"{_said(name, fields, model)}: must be a whole number"
        elif value < 1:
            yield f"{_said(name, fields, model)}: must be 1 or more"
        elif name in NAMES["layers"] and value > MOST_LAYERS:
            yield f"{_said(name, fields, model)}: must be {MOST_LAYERS:,} or less"
    for name, value in fields.items():
        if isinstance(value, float) and isnan(value):
            yield f"{_said(name, fields, model)}: must be a number"
        elif name.endswith(DROPPED) and _is_number(value) and not 0 <= value < 1:
            yield f"{_said(name, fields, model)}: must be 0 or more and less than 1"
    found = sizes(fields)
    if found.heads and found.key_value_heads and found.heads % found.key_value_heads:
        name = next(name for name in NAMES["key_value_heads"] if fields.get(name))
        said, heads = _said(name, fields, model), found.heads
        yield f"{said}: must divide the {heads} attention heads; use a divisor of {heads}"
    yield from check_experts(fields, model)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def experts_of(fields: Mapping[str, Any]) -> int | None:
    """Experts per layer, if the fields give them; None also for a dense model."""
    found = first(fields, EXPERTS)
    return found if found is not None and found > 1 else None


def first(fields: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The value of the first of these fields that is a number."""
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def check_experts(fields: Mapping[str, Any], model: Model) -> Iterator[str]:
    """Like `check_sizes`, for routed experts: their numbers have defaults that only the config's class knows."""
    experts = first(fields, EXPERTS)
    for name in CHOSEN if experts else ():
        if isinstance(fields.get(name), int) and fields[name] > experts:
            yield f"{_said(name, fields, model)}: a token cannot go to more than the {experts} experts that there are"


def _said(name: str, fields: Mapping[str, Any], model: Model) -> str:
    """A field in the form it would be typed, with its value; for a folder's config, with the folder."""
    source = (
        "model.config." if model.path is None or name in text_fields(model.config) else f"model.path={model.path}: "
    )
    return f"{source}{name}={fields[name]}"
