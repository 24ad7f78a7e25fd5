"""The torch engine that applies each gradient inside the backward and frees it (`trainer.update.in_backward`).

    clip_grad_norm=0    forward_backward: the forward         step: the backward, which updates
    clip_grad_norm>0    forward_backward: both, measuring     step: both again with the same random numbers, updating

A parameter's gradient is complete after the backward of its last use, so updating it changes nothing that the rest of
the backward reads. FSDP2 calls the hooks of its shards once a group has been reduced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import TrainingFailed
from configs.schema import Config
from trainer.axes import REPLICATE
from trainer.axes.gradients import GlobalNorm, clamp, scale
from trainer.data import Batch
from trainer.engine.protocol import StepReport
from trainer.engine.torch import TorchEngine
from trainer.model.precision import torch_dtype
from trainer.optim.build import learning_rates, set_lr
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime

Flying = tuple[torch.Tensor, torch.Tensor, Any]
"""A parameter, its gradient in transit between replicas, and the handle that signals its arrival."""


class InBackward(TorchEngine):
    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        super().__init__(config, plan, runtime)
        groups = self.optimizer.param_groups
        self.alone = {parameter: {**group, "params": [parameter]} for group in groups for parameter in group["params"]}
        self.replicas = self.mesh.get_group(REPLICATE) if plan.copied else None
        self.sent_dtype = torch_dtype(plan.reduce_dtype)
        self.flying: Flying | None = None
        self.applying, self.factor = False, 1.0
        self.norm = GlobalNorm(self.mesh, runtime.device)
        self.kept: list[Any] = []
        for parameter in self.alone:
            parameter.register_post_accumulate_grad_hook(self._came)

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        random = _random_state(self.runtime.device)
        total = super().forward_backward(micro_batches, valid_tokens)
        if self.clip_grad_norm:
            self.kept = [micro_batches, valid_tokens, random]
        return total

    def step(self, lr: float) -> StepReport:
        for group in self.alone.values():
            group["lr"] = lr * group["lr_factor"]
        set_lr(self.optimizer, lr)
        grad_norm, finite = self._clipped() if self.clip_grad_norm else self._unclipped()
        if finite and self.balancing is not None:
            self.balancing.commit()
        self.discard()
        experts = self.balancing.report() if self.balancing is not None else {}
        rates = learning_rates(self.optimizer)
        return StepReport(grad_norm=grad_norm, updated=finite, learning_rates=rates, experts=experts)

    def discard(self) -> None:
        super().discard()
        self.kept.clear()
        self.norm = GlobalNorm(self.mesh, self.runtime.device)

    def _clipped(self) -> tuple[float, bool]:
        """The second forward and backward. The first one measured the norm."""
        grad_norm = self.norm.total()
        if not math.isfinite(grad_norm):
            return grad_norm, False
        micro_batches, valid_tokens, random = self.kept
        _set_random_state(self.runtime.device, random)
        self.factor, self.applying = self._clip_factor(grad_norm), True
        try:
            super().forward_backward(micro_batches, valid_tokens)
        finally:
            self.factor, self.applying = 1.0, False
        return grad_norm, True

    def _unclipped(self) -> tuple[float, bool]:
        """The backward of the preceding forward. Its gradients are measured as they are computed."""
        (loss,) = self.kept
        self.applying = True
        try:
            loss.backward()
            self._land()
        finally:
            self.applying = False
        grad_norm = self.norm.total()
        if not math.isfinite(grad_norm):
            raise TrainingFailed(
                f"gradient norm {grad_norm}: optimizer.in_backward=true has made part of this update; resume from the"
                " newest checkpoint, with train.clip_grad_norm=1, whose first backward sees it before anything changes"
            )
        return grad_norm, True

    def _accumulate(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor, factor: float) -> torch.Tensor:
        (batch,) = micro_batches
        loss = self._loss(self.model, batch) / valid_tokens
        if self.clip_grad_norm:
            (loss * factor).backward()
            self._land()
        else:
            self.kept = [loss * factor]
        return loss.detach().double()

    @torch.no_grad()
    def _came(self, parameter: torch.Tensor) -> None:
        """A gradient is complete on this rank. It is sent between replicas while the next one is computed."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self.replicas is None:
            self._use(parameter, gradient)
            return
        sent = gradient.to(self.sent_dtype).div_(self.replicas.size())
        del gradient
        work = dist.all_reduce(sent, group=self.replicas, async_op=True)
        self._land()
        self.flying = (parameter, sent, work)

    @torch.no_grad()
    def _land(self) -> None:
        if self.flying is None:
            return
        parameter, sent, work = self.flying
        self.flying = None
        work.wait()
        self._use(parameter, sent.to(parameter.dtype))

    def _use(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if not (self.applying and self.clip_grad_norm):
            self.norm.add([gradient])
        if not self.applying:
            return
        scale([gradient], self.factor)
        clamp([gradient], self.clip_grad_value)
        whole, self.optimizer.param_groups = self.optimizer.param_groups, [self.alone[parameter]]
        parameter.grad = gradient
        try:
            self.optimizer.step()
        finally:
            parameter.grad, self.optimizer.param_groups = None, whole


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    torch.random.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
