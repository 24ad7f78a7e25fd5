"""Initial values of a tuned model: the frozen part from `model.weights`, added parameters from their kind.

Each added parameter draws from a generator seeded with the run's seed and its name: the same numbers everywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from configs.adapter_folder import TENSORS
from configs.schema import Tuning
from trainer import linear
from trainer.model.filling import WeightSource
from trainer.model.peft import stored_name


class TunedWeights:
    """Fulfils `trainer.model.filling.WeightSource`, on top of the base model's source."""

    def __init__(self, base: WeightSource, tuning: Tuning, seed: int) -> None:
        self.base, self.tuning, self.seed = base, tuning, seed

    def fill(self, name: str, unit: nn.Module, keys: list[str]) -> None:
        prefix = f"{name}." if name else ""
        added: dict[str, list[str]] = {}
        for key in keys:
            kind = linear.owner_of(prefix + key)
            added.setdefault(kind.__name__ if kind is not None else "", []).append(key)
        if plain := added.get(""):
            self.base.fill(name, unit, plain)
        for kind in linear.KINDS:
            if own := added.get(kind.__name__):
                kind.fill(unit, prefix, own, self.tuning, self._generator)
        if self.tuning.adapter is not None:
            with safe_open(Path(self.tuning.adapter) / TENSORS, framework="pt") as file:
                stored = set(file.keys())
                for key in keys:
                    if (there := stored_name(prefix + key)) in stored:
                        unit.get_parameter(key).copy_(file.get_tensor(there))

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
