"""The fields of a Hugging Face config that are needed before transformers is imported, under one name each. Torch-free.

Architectures spell the same size differently (`hidden_size`, GPT-2's `n_embd`). A composite config, of a model that
reads images or sound as well, keeps the sizes of its language model in a config of its own, `text_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import Config

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
    return Sizes(**{size: value if isinstance(value, int) else None for size, value in found.items()})
