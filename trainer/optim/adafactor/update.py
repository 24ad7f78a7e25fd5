"""Adafactor on this rank's pieces; the ranks that hold the other pieces add up the sums for its means.

    R  <- mean of G^2 over columns      rows' sums: over the axes that cut columns
    C  <- mean of G^2 over rows         columns' sums: over the axes that cut rows
    U  <- G / sqrt(R C / mean(R))       the sum of R: over the axes that cut rows
    W  <- W - lr max(RMS(W), 1e-3) U / max(1, RMS(U))            squares of W and U: over all axes that cut

Three all-reduces per step and mesh axis, for any number of parameters: rows, columns and W; the sums of R; U.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from trainer.optim.placed import local, local_gradient, reduce_together, sharding_groups, zeros

SMALLEST_SCALE = 1e-3  # the paper's epsilon 2: a parameter whose elements are all zero still moves
Numbers = dict[torch.Tensor, torch.Tensor]


class Adafactor(torch.optim.Optimizer):
    """Param groups hold lr, the largest relative step, and weight_decay. Defaults of the paper's section 9."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, eps: float) -> None:
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in held:
            self._start(parameter)
            self.state[parameter]["step"] += 1
        weights = self._means([parameter for _, parameter in held])
        centres = self._centres([parameter for _, parameter in held if parameter.ndim > 1])
        updates: Numbers = {}
        for group, parameter in held:
            if sharding_groups(parameter, range(parameter.ndim)):
                updates[parameter] = _squares(self._update(parameter, centres, group["eps"]))
        _add_up([(parameter, range(parameter.ndim), square) for parameter, square in updates.items()])
        for group, parameter in held:
            self._apply(group, parameter, centres, weights[parameter], updates.get(parameter))

    def _start(self, parameter: torch.Tensor) -> None:
        state, shape = self.state[parameter], parameter.shape
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        if parameter.ndim > 1:
            state["row_var"] = zeros(parameter, (*shape[:-1], 1), parameter.dtype)
            state["col_var"] = zeros(parameter, (*shape[:-2], 1, shape[-1]), parameter.dtype)
        else:
            state["variance"] = zeros(parameter, shape, parameter.dtype)

    def _means(self, parameters: list[torch.Tensor]) -> Numbers:
        """Move the means towards those of this step's gradients. Returns the sum of squares of each parameter."""
        weights = {parameter: _squares(local(parameter)) for parameter in parameters}
        sums: dict[str, Numbers] = {"row_var": {}, "col_var": {}}
        for parameter in parameters:
            gradient = local_gradient(parameter)
            if parameter.ndim > 1:
                sums["row_var"][parameter] = _squares(gradient, -1)
                sums["col_var"][parameter] = _squares(gradient, -2)
            else:
                state = self.state[parameter]
                local(state["variance"]).lerp_(gradient.square(), state["step"].item() ** -0.8)
        _add_up(
            [
                *((parameter, (-1,), found) for parameter, found in sums["row_var"].items()),
                *((parameter, (-2,), found) for parameter, found in sums["col_var"].items()),
                *((parameter, range(parameter.ndim), found) for parameter, found in weights.items()),
            ]
        )
        for kind, dim in (("row_var", -1), ("col_var", -2)):
            for parameter, found in sums[kind].items():
                state = self.state[parameter]
                local(state[kind]).lerp_(found.div_(parameter.shape[dim]), state["step"].item() ** -0.8)
        return weights

    def _centres(self, matrices: list[torch.Tensor]) -> Numbers:
        """The mean of each matrix's row means."""
        found = {matrix: local(self.state[matrix]["row_var"]).sum(-2, keepdim=True) for matrix in matrices}
        _add_up([(matrix, (-2,), total) for matrix, total in found.items()])
        return {matrix: total.div_(matrix.shape[-2]) for matrix, total in found.items()}

    def _update(self, parameter: torch.Tensor, centres: Numbers, eps: float) -> torch.Tensor:
        state = self.state[parameter]
        if parameter.ndim > 1:
            found = local(state["row_var"]) @ local(state["col_var"])
            found.div_(centres[parameter].clamp(min=eps))
        else:
            found = local(state["variance"]).clone()
        return found.clamp_(min=eps * eps).rsqrt_().mul_(local_gradient(parameter))

    def _apply(
        self,
        group: dict[str, Any],
        parameter: torch.Tensor,
        centres: Numbers,
        weight: torch.Tensor,
        square: torch.Tensor | None,
    ) -> None:
        """weight, square: sums of squares of the whole parameter and its update; None: this rank has all of it."""
        size, lr = parameter.numel(), min(group["lr"], self.state[parameter]["step"].item() ** -0.5)
        update = self._update(parameter, centres, group["eps"])
        square = _squares(update) if square is None else square
        step = lr * (weight / size).sqrt().clamp(min=SMALLEST_SCALE) / (square / size).sqrt().clamp(min=1.0)
        local(parameter).mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(step))


def _squares(tensor: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The sum of squares, without a copy of them."""
    return torch.linalg.vector_norm(tensor, dim=dim, keepdim=dim is not None).square_()


def _add_up(parts: list[tuple[torch.Tensor, Any, torch.Tensor]]) -> None:
    reduce_together(parts, dist.ReduceOp.SUM)
