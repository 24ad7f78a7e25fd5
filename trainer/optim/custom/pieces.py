"""An optimizer that does not support sharded tensors, run on a rank's pieces: its update is element by element, so the
update of a piece is the piece of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from configs.schema import Optimizer as Settings
from trainer.optim.custom.probe import construct
from trainer.optim.placed import as_piece, local, local_gradient
from trainer.optim.protocol import COUNTER, Group


def build_on_pieces(groups: Sequence[Group], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer itself, if parameters are plain tensors."""
    params = [group.as_torch(settings.lr) for group in groups]
    if not any(isinstance(parameter, DTensor) for group in params for parameter in group["params"]):
        return construct(settings, params)
    return OnPieces(params, lambda inner: construct(settings, inner))


class OnPieces(torch.optim.Optimizer):
    """State: the inner optimizer's, placed as the parameters are."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})
        self.pieces = {p: _piece(p) for group in self.param_groups for p in group["params"]}
        held = [{**group, "params": [self.pieces[p] for p in group["params"]]} for group in self.param_groups]
        self.inner = make(held)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter, piece in self.pieces.items():
            if piece is not parameter:
                piece.data = local(parameter)
                piece.grad = local_gradient(parameter) if parameter.grad is not None else None
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own["lr"] = group["lr"]
        self.inner.step()
        for parameter, piece in self.pieces.items():
            if piece is not parameter:
                if piece.data_ptr() != local(parameter).data_ptr():  # not updated in place
                    local(parameter).copy_(piece)
                piece.grad = None
            self._show(parameter, piece)

    def adopt(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        """Load states that are placed as the parameter is."""
        held = {kind: local(value) if isinstance(value, torch.Tensor) else value for kind, value in state.items()}
        self.inner.state[self.pieces[parameter]] = held

    def _show(self, parameter: torch.Tensor, piece: torch.Tensor) -> None:
        """The inner optimizer's states of a piece, as states of the parameter."""
        shown = self.state[parameter]
        for kind, value in self.inner.state.get(piece, {}).items():
            same = isinstance(value, torch.Tensor) and value.shape == piece.shape
            if not (same and isinstance(parameter, DTensor)):
                shown[kind] = value
            elif kind not in shown or local(shown[kind]).data_ptr() != value.data_ptr():
                shown[kind] = as_piece(value, parameter, parameter.placements, parameter.shape)


def adopt(built: torch.optim.Optimizer, parameter: torch.Tensor, made: dict[str, Any], *, steps: int) -> dict[str, Any]:
    if isinstance(built, OnPieces):
        built.adopt(parameter, made)
    if COUNTER in made and any(isinstance(state.get(COUNTER), int) for state in built.state.values()):
        made[COUNTER] = steps
    return made


def _piece(parameter: torch.Tensor) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        return nn.Parameter(local(parameter.detach()))
    assert isinstance(parameter, nn.Parameter)
    return parameter
