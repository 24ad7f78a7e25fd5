"""Communication between tensor-parallel ranks, as pairs: one collective forward, its counterpart backward.

The gradient of "copy to all" is "sum from all", the gradient of "gather" is "reduce-scatter", and vice versa. t ranks,
n bytes of the whole activation, ring algorithms; each rank sends:

    pair               forward                    backward                    bytes forward / backward
    enter              nothing                    all-reduce                  0 / 2 (t-1)/t n
    leave              all-reduce                 nothing                     2 (t-1)/t n / 0
    enter_sequence     all-gather                 reduce-scatter              (t-1)/t n / (t-1)/t n
    leave_sequence     reduce-scatter             all-gather                  (t-1)/t n / (t-1)/t n
    split              keep this rank's part      all-gather                  0 / (t-1)/t n
    join               all-gather                 keep this rank's part       (t-1)/t n / 0

`enter` and `leave` surround a region whose ranks compute different parts from the same input; the `_sequence` pair does
the same and leaves the activation outside divided along the sequence: the same bytes, since an all-reduce is a
reduce-scatter and an all-gather. `split` and `join` surround computation that all ranks share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

Operation = Callable[[torch.Tensor], torch.Tensor]
# Renamed in torch 2.13; the old names warn.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """The tensor-parallel ranks and the six ways in which an activation [batch, seq_len, features] passes between them.
    dim: the divided dimension, by default the sequence."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return _Pair.apply(x, _identity, self._all_reduce)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        return _Pair.apply(x, self._all_reduce, _identity)

    def enter_sequence(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return _Pair.apply(x, partial(self._all_gather, dim=dim), partial(self._reduce_scatter, dim=dim))

    def leave_sequence(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return _Pair.apply(x, partial(self._reduce_scatter, dim=dim), partial(self._all_gather, dim=dim))

    def split(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return _Pair.apply(x, partial(self._part, dim=dim), partial(self._all_gather, dim=dim))

    def join(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return _Pair.apply(x, partial(self._all_gather, dim=dim), partial(self._part, dim=dim))

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, one after the other. No gradient passes."""
        return self._all_gather(x, dim=0)

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        _check_sequence(x, dim)
        # Collectives divide the first dimension of contiguous memory.
        part = x.movedim(dim, 0).contiguous()
        whole = part.new_empty((self.size * part.shape[0], *part.shape[1:]))
        _gather(whole, part, group=self.group)
        # Moving nothing would give a view, and FSDP2 accepts no views from a module.
        return whole.movedim(0, dim).contiguous() if dim else whole

    def _reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._check_divisible(x, dim)
        whole = x.movedim(dim, 0).contiguous()
        part = whole.new_empty((whole.shape[0] // self.size, *whole.shape[1:]))
        _scatter(part, whole, group=self.group)
        return part.movedim(0, dim).contiguous()

    def _part(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._check_divisible(x, dim)
        length = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * length, length).contiguous()

    def _check_divisible(self, x: torch.Tensor, dim: int) -> None:
        _check_sequence(x, dim)
        if x.shape[dim] % self.size:
            raise ValueError(f"{x.shape[dim]} positions do not divide over {self.size} tensor-parallel ranks")


def paired(x: torch.Tensor, there: Operation, back: Operation) -> torch.Tensor:
    """`there` in the forward; its gradient passes through `back`."""
    return _Pair.apply(x, there, back)


class _Pair(torch.autograd.Function):
    """One operation forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Operation, back: Operation) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.back(gradients[0]), None, None


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _check_sequence(x: torch.Tensor, dim: int) -> None:
    """Some models fold batch and sequence into one dimension; dividing it would mix tokens of other sequences."""
    if dim == 1 and x.ndim != 3:
        raise ValueError(f"hidden states of shape {list(x.shape)} have no sequence dimension to divide")
