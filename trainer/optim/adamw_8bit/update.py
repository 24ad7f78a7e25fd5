"""AdamW whose moments are kept in 8-bit codes, on pieces of matrices.

    M, V <- decode(codes, scales); AdamW's moments            in float32, some rows at a time
    W    <- AdamW's update by M and V                         before they are rounded
    scales <- largest magnitude of each block of M, V;        codes <- encode(M, V, scales)

A block of the whole matrix may lie on several ranks, if an axis divides its rows' columns. These ranks each keep the
scales of whole rows, and agree on them in one all-reduce per step and axis: a first pass over M and V finds the maximum
of each rank's part of a block, the second pass updates and encodes. So every layout holds the codes of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainer.model.pieces import held
from trainer.optim.adamw_8bit.blocks import AT_ONCE, BLOCK
from trainer.optim.adamw_8bit.codes import Map, Slab, positive_map, signed_map, slabs
from trainer.optim.placed import local, local_gradient, reduce_together, sharding_groups, zeros

CODES, SCALES = ("exp_avg", "exp_avg_sq"), ("exp_avg_scale", "exp_avg_sq_scale")


class AdamW8bit(torch.optim.Optimizer):
    """Param groups hold lr, betas, eps and weight_decay."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        self._slabs: dict[torch.Tensor, list[Slab]] = {}
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                _maps(_wide(parameter.dtype), local(parameter).device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        held_ = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in held_:
            self._start(parameter)
        largest = {parameter: self._largest(group, parameter) for group, parameter in held_ if _shared(parameter)}
        reduce_together([(parameter, (-1,), found) for parameter, found in largest.items()], dist.ReduceOp.MAX)
        for group, parameter in held_:
            self._update(group, parameter, largest.get(parameter))

    def _start(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            blocks = (*parameter.shape[:-1], -(-parameter.shape[-1] // BLOCK))
            for codes, scales in zip(CODES, SCALES, strict=True):
                state[codes] = zeros(parameter, parameter.shape, torch.uint8)
                state[scales] = zeros(parameter, blocks, torch.float32)
        if parameter not in self._slabs:
            if isinstance(parameter, DTensor) and _shared(parameter):
                self._slabs[parameter] = slabs(held(parameter, parameter.ndim - 1))
            else:
                self._slabs[parameter] = _whole(parameter.shape[-1])

    def _parts(self, parameter: torch.Tensor) -> Iterator[tuple[slice, Slab]]:
        """The piece in parts: some rows of a slab."""
        piece = local(parameter)
        rows = piece.numel() // piece.shape[-1] if piece.numel() else 0
        for slab in self._slabs[parameter]:
            some = max(1, AT_ONCE // (slab.end - slab.begin))
            yield from ((slice(begin, min(begin + some, rows)), slab) for begin in range(0, rows, some))

    def _moments(
        self, group: dict[str, Any], parameter: torch.Tensor, rows: slice, slab: Slab
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments of the step, [rows, blocks, width], not rounded."""
        state, dtype = self.state[parameter], _wide(parameter.dtype)
        gradient = slab.of(_rows(local_gradient(parameter))[rows]).to(dtype)
        (beta1, beta2), found = group["betas"], []
        for codes, scales, map_ in zip(CODES, SCALES, _maps(dtype, gradient.device), strict=True):
            kept = _rows(local(state[codes]))[rows], _rows(local(state[scales]))[rows]
            found.append(map_.decode(slab.of(kept[0]), slab.scales(kept[1])))
        return found[0].lerp_(gradient, 1 - beta1), found[1].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def _largest(self, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
        """[2, rows, blocks of a whole row]: maximum of this rank's part of each block; 0 for blocks elsewhere."""
        scales = _rows(local(self.state[parameter][SCALES[0]]))
        found = scales.new_zeros(2, *scales.shape)
        for rows, slab in self._parts(parameter):
            for into, moment in zip(found, self._moments(group, parameter, rows, slab), strict=True):
                part = slab.scales(into[rows])
                part.copy_(torch.maximum(part, _reach(moment)))
        return found

    def _update(self, group: dict[str, Any], parameter: torch.Tensor, largest: torch.Tensor | None) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        weight = local(parameter)
        maps = _maps(_wide(parameter.dtype), weight.device)
        for rows, slab in self._parts(parameter):
            moments = self._moments(group, parameter, rows, slab)
            part = slab.of(weight.view(-1, weight.shape[-1])[rows])
            part.mul_(1 - group["lr"] * group["weight_decay"])
            below = moments[1].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
            part.addcdiv_(moments[0], below, value=-group["lr"] / (1 - beta1**step))
            del below
            for number, (moment, map_) in enumerate(zip(moments, maps, strict=True)):
                scales = slab.scales(_rows(local(state[SCALES[number]]))[rows])
                if largest is None:
                    scales.copy_(_reach(moment))
                    map_.encode_(moment, scales, slab.of(_rows(local(state[CODES[number]]))[rows]))
                else:
                    agreed = slab.scales(largest[number][rows])
                    map_.encode_(moment, agreed, slab.of(_rows(local(state[CODES[number]]))[rows]))
        if largest is not None:
            # Only now: a block in several slabs was decoded by its old scale.
            for kind, agreed in zip(SCALES, largest, strict=True):
                _rows(local(state[kind])).copy_(agreed)


def _shared(parameter: torch.Tensor) -> bool:
    """Whether other ranks hold other columns of the same rows."""
    return bool(sharding_groups(parameter, (-1,)))


def _reach(moment: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(moment, torch.inf, dim=-1).float()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@lru_cache
def _maps(dtype: torch.dtype, device: torch.device) -> tuple[Map, Map]:
    return signed_map(dtype, device), positive_map(dtype, device)


@lru_cache
def _whole(columns: int) -> list[Slab]:
    return slabs(range(columns))
