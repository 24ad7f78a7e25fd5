"""An optimizer whose update of an element depends only on that element: one function, run on each rank's pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from trainer.optim.placed import local, local_gradient

Tensors = dict[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, Tensors, dict[str, Any]], None]
"""Weight, gradient and states of a piece, and the param group."""


class Elementwise(torch.optim.Optimizer):
    """start: the states of a parameter before its first update, with its placement."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        update: Update,
        start: Callable[[torch.Tensor], Tensors],
        **defaults: Any,
    ) -> None:
        self._update, self._start = update, start
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._start(parameter))
                pieces = {kind: local(tensor) for kind, tensor in state.items()}
                self._update(local(parameter), local_gradient(parameter), pieces, group)
