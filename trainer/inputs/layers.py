"""Virtual tokens in a model: peft's modules, and the forward of a model that has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from trainer.inputs.described import ENCODER, Described
from trainer.model.peft import NAME, import_peft

SAVED = "prompt_embeddings"  # the only tensor of peft's file


class BeforeText:
    """A model whose forward prepends embeddings to those of the text."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        model: Any = self
        text = model.get_input_embeddings()(input_ids)
        tokens = _tokens(model, input_ids).to(text.dtype)
        embeddings = torch.cat([tokens.expand(len(text), -1, -1), text], dim=1)
        output: Any = super().forward(inputs_embeds=embeddings, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        output.logits = output.logits[:, tokens.shape[-2] :]
        return output


class BeforeKeys:
    """A model whose layers get keys and values before those of the text."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        model: Any = self
        described = model.peft_config[NAME]
        tokens = _tokens(model, input_ids).view(
            described.num_virtual_tokens, described.num_layers, 2, described.num_attention_heads, -1
        )
        cache = DynamicCache()
        for layer, pair in enumerate(tokens.permute(1, 2, 3, 0, 4)):
            keys, values = (part.expand(len(input_ids), -1, -1, -1) for part in pair)
            cache.update(keys, values, layer)
        return super().forward(input_ids=input_ids, past_key_values=cache, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def _tokens(model: Any, like: torch.Tensor) -> torch.Tensor:
    return getattr(model, ENCODER)(torch.arange(model.peft_config[NAME].num_virtual_tokens, device=like.device))


def add_virtual_tokens(
    model: PreTrainedModel, chosen: Described, count: int, *, base: str | None, on_meta: bool = True
) -> None:
    """Add the parameters and the forward to the model, and freeze the rest. base: `model.path`. Raises
    EnvironmentProblem without peft."""
    import_peft(chosen.method)
    described = chosen.described(_common(model, count, base), model.config.get_text_config())
    with init_empty_weights(include_buffers=False) if on_meta else nullcontext():
        encoder: nn.Module = chosen.encoder(described)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    setattr(model, ENCODER, encoder.to(next(model.parameters()).dtype))
    described.base_model_name_or_path = base
    model.peft_config = {NAME: described}  # pyright: ignore[reportAttributeAccessIssue]
    kind = type(model)
    forward = BeforeText if chosen.AS_TEXT else BeforeKeys
    # A class, so that copies of the model call their own forward.
    model.__class__ = type(kind.__name__, (forward, kind), {"__module__": kind.__module__})


def _common(model: PreTrainedModel, count: int, base: str | None) -> dict[str, Any]:
    text: Any = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    return {
        "num_virtual_tokens": count,
        "num_transformer_submodules": 1,
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "token_dim": embedding.embedding_dim,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }


def begin(unit: nn.Module, prefix: str, keys: list[str], generator: Any) -> None:
    """peft's initial values: embeddings from a normal distribution, linear layers as torch's own."""
    for key in keys:
        parameter = unit.get_parameter(key)
        drawn = generator(prefix + key, parameter.device)
        if "embedding" in prefix + key:
            nn.init.normal_(parameter, generator=drawn)
        else:
            owner: Any = unit.get_submodule(key.rpartition(".")[0])
            bound = 1 / math.sqrt(owner.in_features)
            nn.init.uniform_(parameter, -bound, bound, generator=drawn)


def as_peft_saves(chosen: Described, described: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Content of the virtual tokens' file: their values. tensors: all parameters of the method, by name."""
    encoder = chosen.encoder(described).to(next(iter(tensors.values())).dtype)
    encoder.load_state_dict({name.removeprefix(f"{ENCODER}."): value for name, value in tensors.items()})
    with torch.no_grad():
        return {SAVED: encoder(torch.arange(described.num_virtual_tokens)).detach().clone()}
