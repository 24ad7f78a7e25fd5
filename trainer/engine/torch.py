"""Torch-native engine: a Hugging Face model, made parallel by `parallelize`, and torch's optimizer.

One step:  for each micro-batch: forward, loss, backward (gradients add up; the last one communicates)
           global norm -> finite? -> clip -> update -> clear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from configs.schema import Config
from trainer.data import Batch
from trainer.engine import StepReport
from trainer.loss import cross_entropy_sum
from trainer.model import build_hf_config, build_model, materialize
from trainer.optimizer import build_optimizer, param_groups, set_lr
from trainer.parallelize import parallelize
from trainer.plan import Plan
from trainer.precision import apply_tf32, autocast, build_loss_scale, torch_dtype
from trainer.runtime import Runtime
from trainer.weights import build_weights


class TorchEngine:
    """Fulfils `trainer.engine.Engine` for single process and data parallel."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        apply_tf32(config.precision)
        self.plan = plan
        self.clip_grad_norm = config.train.clip_grad_norm
        self.loss_scale = build_loss_scale(config.precision)
        self.model = build_model(config.model, build_hf_config(config.model))
        weights = build_weights(config.model, self.model, seed=config.train.seed)
        materialize(self.model, weights, device=runtime.device, dtype=torch_dtype(plan.master_dtype))
        self.model.train()
        self.module = parallelize(self.model, config, plan, runtime)
        groups = param_groups(self.model.named_parameters(), config.optimizer.weight_decay)
        self.optimizer = build_optimizer(groups, config.optimizer)

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=valid_tokens.device, dtype=torch.float64)
        # DDP averages over the ranks; the loss is a sum over them.
        factor = self.plan.data_parallel_size * (self.loss_scale.value if self.loss_scale else 1.0)
        for number, batch in enumerate(micro_batches, start=1):
            with self._synchronise(last=number == len(micro_batches)):
                loss = self._loss(self.module, batch) / valid_tokens
                (loss * factor).backward()
            total += loss.detach()
        return total

    def step(self, lr: float) -> StepReport:
        scale = self.loss_scale.value if self.loss_scale else None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = get_total_norm(gradients).item() / (scale or 1.0)
        finite = math.isfinite(grad_norm)
        if self.loss_scale:
            self.loss_scale.update(finite=finite)
        if finite:
            torch._foreach_mul_(gradients, self._clip_factor(grad_norm) / (scale or 1.0))
            set_lr(self.optimizer, lr)
            self.optimizer.step()
        self.discard()
        return StepReport(grad_norm=grad_norm, updated=finite, loss_scale=scale)

    def discard(self) -> None:
        # Under DDP gradients are views of its buckets; set to None, accumulation would hold a second copy beside them.
        self.optimizer.zero_grad(set_to_none=not isinstance(self.module, DistributedDataParallel))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        loss = self._loss(self.model, batch)
        self.model.train()
        return loss

    def parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        main = torch.distributed.get_rank() == 0
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().cpu() if main else None

    def close(self) -> None:
        """Nothing is held outside the process."""

    def _loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        with autocast(self.plan):
            logits = module(input_ids=batch.input_ids, use_cache=False).logits
        return cross_entropy_sum(logits, batch.labels)

    def _synchronise(self, *, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch's backward may communicate; `no_sync` must cover the forward too."""
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def _clip_factor(self, grad_norm: float) -> float:
        """torch.nn.utils.clip_grad_norm_'s factor, with its 1e-6 against division by zero."""
        return min(1.0, self.clip_grad_norm / (grad_norm + 1e-6)) if self.clip_grad_norm else 1.0
