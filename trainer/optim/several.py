"""Several optimizers as one, each for its own parameters: engines, checkpoint and learning rate see one list of param
groups and one dict of states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Several(torch.optim.Optimizer):
    """parts: by the name that their groups hold as `optimizer`."""

    def __init__(self, parts: Mapping[str, torch.optim.Optimizer]) -> None:
        self.parts = dict(parts)
        super().__init__([group for part in parts.values() for group in part.param_groups], {})
        for part in parts.values():
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates the current `param_groups`, which may be a part of the original ones."""
        for name, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["optimizer"] == name]
            if part.param_groups:
                part.step()

    def of(self, parameter: torch.Tensor) -> str:
        """The part that updates a parameter."""
        groups = (group for group in self.param_groups if any(parameter is one for one in group["params"]))
        return next(groups)["optimizer"]
