"""The fields of a Hugging Face config that are needed before transformers is imported, under one name each. Torch-free.

Architectures spell the same size differently (`hidden_size`, GPT-2's `n_embd`). A composite config, of a model that
reads images or sound as well, keeps the sizes of its language model in a config of its own, `text_config`.
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
"""Where transformers' `get_text_config` looks, and remote code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of the language model; None where the fields do not tell."""

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
    """Fields of the language model's Hugging Face config that are known here: preset or folder, then overrides.

    A hub id is not looked up: planning needs no network. A file that holds no config counts as empty: `model` says what
    is wrong with it.
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
    """`overrides` laid over `fields`. A size that a composite config keeps in its `text_config` goes there; a group of
    fields changes only what it names."""
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
    """Name of the field that holds the language model's own config; None in a config of a language model."""
    return next((name for name in TEXT_PARTS if isinstance(fields.get(name), Mapping)), None)


def text_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields of a config that may be composite."""
    part = text_part(fields)
    return {**fields, **text_fields(fields[part])} if part else dict(fields)


def sizes(fields: Mapping[str, Any]) -> Sizes:
    """The sizes of the language model that these fields tell."""
    text = text_fields(fields)
    found = {size: next((text[name] for name in names if text.get(name)), None) for size, names in NAMES.items()}
    return Sizes(**{size: value if isinstance(value, int) and value > 0 else None for size, value in found.items()})


def attention_width(fields: Mapping[str, Any]) -> int:
    """Heads times the size of one, by which the work of attention grows. fields: of the language model. Where queries
    and keys are of another size than values (DeepSeek's latent attention) it is the mean of the two."""
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
"""Names for the list of the layers' kinds."""
ATTENTION = {
    "attention": None,
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "global": None,
    "local": "window_size",
}
"""Kinds of layers whose work grows with the length of the sequence, as configs name them, and the field that says how
far each sees."""


def attention_spans(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """How many tokens one sees at most, itself included, in each layer that has attention; None: all up to itself.

    fields: of the language model's config, with what its class adds.
    """
    kinds = next((fields[name] for name in KINDS if fields.get(name)), ())
    if not kinds:
        # Without a list of kinds a window is that of every layer (Mistral).
        return (fields.get("sliding_window") or None,) * (sizes(fields).layers or 0)
    windows = (ATTENTION[kind] for kind in kinds if kind in ATTENTION)
    return tuple(fields.get(window) or None if window else None for window in windows)


def keys_seen(spans: Iterable[int | None], seq_len: int) -> int:
    """Of one token, in all layers together, as if the masked half of a layer were seen: the end of the sequence sees as
    much as a window or the sequence holds."""
    return sum(seq_len if span is None else min(span, seq_len) for span in spans)


COUNTS = ("hidden", "layers", "heads", "key_value_heads", "vocabulary")
MLP = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
"""Names for the features of an MLP."""
WIDTHS = (*MLP, "head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_moe_experts", "moe_num_experts")
"""Names for the number of routed experts in a layer."""
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
"""Names for the number of them that a token goes to."""
MOST_LAYERS = 10_000
"""More are a slip of the keyboard, and building them takes minutes."""
DROPPED = ("dropout", "dropout_prob", "pdrop", "layerdrop")
"""Endings of the names of probabilities with which values or layers are dropped."""


def check_sizes(fields: Mapping[str, Any], model: Model) -> Iterator[str]:
    """One line for each size that no model can have. fields: of the language model, as far as known."""
    known = [name for names in (*(NAMES[count] for count in COUNTS), WIDTHS) for name in names]
    for name in known:
        # Some configs have a list with an entry for each layer.
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
    told = sizes(fields)
    if told.heads and told.key_value_heads and told.heads % told.key_value_heads:
        name = next(name for name in NAMES["key_value_heads"] if fields.get(name))
        said, heads = _said(name, fields, model), told.heads
        yield f"{said}: must divide the {heads} attention heads; use a divisor of {heads}"
    yield from check_experts(fields, model)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def experts_of(fields: Mapping[str, Any]) -> int | None:
    """Experts of a layer, as far as the fields tell; None for a dense model too."""
    found = first(fields, EXPERTS)
    return found if found is not None and found > 1 else None


def first(fields: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The first of these fields that is a number."""
    return next((fields[name] for name in names if isinstance(fields.get(name), int)), None)


def check_experts(fields: Mapping[str, Any], model: Model) -> Iterator[str]:
    """As `check_sizes`, of routed experts: their numbers have defaults that only the config's class knows."""
    experts = first(fields, EXPERTS)
    for name in CHOSEN if experts else ():
        if isinstance(fields.get(name), int) and fields[name] > experts:
            yield f"{_said(name, fields, model)}: a token cannot go to more than the {experts} experts that there are"


def _said(name: str, fields: Mapping[str, Any], model: Model) -> str:
    """A field, as it would be typed, with its value; of a folder's config, with the folder."""
    source = (
        "model.config." if model.path is None or name in text_fields(model.config) else f"model.path={model.path}: "
    )
    return f"{source}{name}={fields[name]}"
