"""User-defined models for tests of `model.target`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class GatedConfig(LlamaConfig):
    model_type = "gated_llama"

    gate: float = 0.5


class GatedMLP(LlamaMLP):
    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.gate = config.gate
        self.shift = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gate * self.shift(x)


class Gated(LlamaForCausalLM):
    """Llama with one more matrix in each MLP."""

    config_class = GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = GatedMLP(config)
        self.post_init()


class Wider(Gated):
    """Another class with the same config class."""


class Borrowed(LlamaForCausalLM):
    """Uses the config class of another model."""
