"""MeZO's direction: one random number per parameter of the model, drawn again from its seed at each use."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainer.model.pieces import local_share


class Direction(torch.optim.Optimizer):
    """seed, updates: inputs of a step's direction. slope: of the loss along it, which `step` descends.

    Groups have the `names` of their parameters, which are the same under every layout.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.seed, self.updates, self.slope = 0, 0, 0.0

    @torch.no_grad()
    def move(self, distance: float) -> None:
        """Move the parameters along the direction."""
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                self._move(name, parameter, distance)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                _local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                self._move(name, parameter, -group["lr"] * self.slope)

    def _move(self, name: str, parameter: torch.Tensor, distance: float) -> None:
        _local(parameter).add_(self._piece(name, parameter), alpha=distance)

    def _piece(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The part of the direction for this rank's piece of a parameter. The whole is drawn, so every layout trains on
        the same numbers."""
        digest = hashlib.sha256(f"{self.seed}:{self.updates}:{name}".encode()).digest()
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
        return local_share(whole, parameter) if isinstance(parameter, DTensor) else whole


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
