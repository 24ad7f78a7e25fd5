"""Bottleneck adapters in a model, their initial values, and the description that is exported with them."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from configs.adapter_folder import BOTTLENECK, CONFIG, OWN_KIND, TENSORS
from configs.errors import ConfigError
from configs.schema import Tuning
from trainer.model.build import decoder_layers
from trainer.model.peft import NAME, stored_name

PLACE = "bottleneck_adapter"
"""Attribute of a decoder layer that holds its adapters."""
MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
"""Names of these modules in decoder layers of transformers."""


class Bottleneck(nn.Module):
    """An adapter of a width, in and out of a layer of `size` features."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(torch.relu(self.down(hidden))).to(hidden.dtype)

    def follow(self, module: nn.Module, given: Any, output: Any) -> Any:
        """A hook of the adapted module. Some modules return more than the hidden states."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)


@dataclass
class Described:
    """Content of the folder's config, with peft's names where it has some."""

    bottleneck: int
    after_attention: bool
    base_model_name_or_path: str | None
    peft_type: str = OWN_KIND
    task_type: str = "CAUSAL_LM"
    inference_mode: bool = False

    is_prompt_learning = False

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / CONFIG).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")


def add_bottlenecks(model: PreTrainedModel, tuning: Tuning, *, base: str | None, on_meta: bool = True) -> None:
    """Give every decoder layer its adapters, and freeze the rest. base: `model.path`. Raises ConfigError for a model
    whose layers do not show where they belong."""
    size = model.config.get_text_config().hidden_size
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    dtype = next(model.parameters()).dtype
    for number, layer in enumerate(decoder_layers(model)):
        places = [_place(model, number, layer, MLPS, "MLP")]
        if tuning.after_attention:
            places.append(_place(model, number, layer, ATTENTIONS, "attention"))
        adapters = nn.ModuleDict()
        for place in places:
            with init_empty_weights() if on_meta else nullcontext():
                adapter = Bottleneck(size, tuning.bottleneck).to(dtype)
            layer.get_submodule(place).register_forward_hook(adapter.follow)
            adapters[place] = adapter
        layer.add_module(PLACE, adapters)
    described = Described(tuning.bottleneck, tuning.after_attention, base)
    model.peft_config = {NAME: described}  # pyright: ignore[reportAttributeAccessIssue]


def _place(model: PreTrainedModel, number: int, layer: nn.Module, names: tuple[str, ...], what: str) -> str:
    found = next((name for name in names if name in layer._modules), None)
    if found is None:
        raise ConfigError(
            f"tuning=adapter: layer {number} of {type(model).__name__} has no module for its {what} (one of"
            f" {', '.join(names)}); use tuning=lora"
        )
    return found


def begin(unit: nn.Module, prefix: str, keys: list[str], generator: Any) -> None:
    """`down` as torch initialises a linear layer, all else zero: step 1 starts from the model itself."""
    for key in keys:
        parameter = unit.get_parameter(key)
        if key.endswith(".down.weight"):
            drawn = generator(prefix + key, parameter.device)
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=drawn)
        else:
            nn.init.zeros_(parameter)


def load_bottlenecks(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapters of an exported folder into their model. Raises RuntimeError if they do not fit it."""
    said = json.loads((folder / CONFIG).read_text())
    add_bottlenecks(model, Tuning(**{name: said[name] for name in BOTTLENECK}), base=None, on_meta=False)
    stored = load_file(folder / TENSORS)
    own = {stored_name(name): name for name, _ in model.named_parameters() if f".{PLACE}." in name}
    if own.keys() != stored.keys():
        raise RuntimeError(f"{TENSORS} holds {len(stored)} tensors, and the adapters of the model have {len(own)}")
    model.load_state_dict({own[name]: value for name, value in stored.items()}, strict=False)
