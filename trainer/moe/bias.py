"""Balancing without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; Wang et al. 2024, arXiv:2408.15664).

Routers of this kind choose experts by score + bias, and weight the experts' outputs by the score alone. After each
update

    bias += rate * sign(mean load - load)

for each expert of a layer: an expert with more than its share of the step's tokens is chosen less often in the next
step. The load is counted over all ranks and micro-batches of the step, so every rank makes the same update.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trainer.moe.routers import Router


class Biases:
    """The biases of one layer's router: in the whole model, and in the pipeline stage made from it."""

    def __init__(self, layers: list[list[Router]]) -> None:
        """layers: for each router of the model its copies on this rank, the whole model's first."""
        self.layers = layers
        # An engine that casts the model to 16 bit would cast them too, and rounding would lose updates.
        self._wide = {router.bias_name: _buffer(router).detach().float().clone() for router in self._each()}

    def keep_wide(self) -> None:
        """Undo an engine's cast. Called before each step."""
        for router in self._each():
            assert router.bias is not None
            owner, leaf = router.bias
            if _buffer(router).dtype not in (torch.float32, torch.float64):
                owner._buffers[leaf] = self._wide[router.bias_name].to(_buffer(router).device)

    @torch.no_grad()
    def update(self, load: torch.Tensor, rate: float) -> None:
        """load: [layers, experts], of the step."""
        for row, copies in zip(load, self.layers, strict=True):
            for router in copies:
                if router.bias is None:
                    continue
                bias = _buffer(router)
                own = row[: router.experts]
                bias.add_((rate * (own.mean() - own).sign()).to(bias).view_as(bias))

    def named(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Each bias by its name in the model, with all its copies on this rank."""
        for copies in self.layers:
            if copies[0].bias is not None:
                yield copies[0].bias_name, [_buffer(router) for router in copies]

    def _each(self) -> Iterator[Router]:
        return (router for copies in self.layers for router in copies if router.bias is not None)


def _buffer(router: Router) -> torch.Tensor:
    assert router.bias is not None
    owner, leaf = router.bias
    buffer = owner._buffers[leaf]
    assert buffer is not None
    return buffer


def corrects_itself(routers: list[Router]) -> bool:
    return bool(routers) and all(router.bias is not None for router in routers)
