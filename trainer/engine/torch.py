"""Torch-native engine: a Hugging Face model, made parallel by `parallelize`, and torch's optimizer.

One step:  for each micro-batch: forward, loss, backward (gradients add up; the last one communicates)
           global norm -> finite? -> clip -> update -> clear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config, OffloadDevice
from trainer import gradients
from trainer.checkpoint.tensors import TensorReader
from trainer.data import Batch
from trainer.engine import Counters, StepReport, torch_state
from trainer.loss import cross_entropy_sum
from trainer.mesh import build_mesh
from trainer.model import build_hf_config, build_model, materialize
from trainer.optimizer import build_optimizer, param_groups, set_lr
from trainer.parallel.ddp import apply_ddp
from trainer.parallel.fsdp import set_last_micro_batch
from trainer.parallelize import parallelize
from trainer.plan import Plan
from trainer.precision import apply_tf32, autocast, build_loss_scale, torch_dtype
from trainer.runtime import Runtime
from trainer.weights import build_weights


class TorchEngine:
    """Fulfils `trainer.engine.Engine` for every layout without DeepSpeed."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        apply_tf32(config.precision)
        self.plan, self.runtime = plan, runtime
        self.clip_grad_norm = config.train.clip_grad_norm
        self.loss_scale = build_loss_scale(config.precision)
        self.mesh = build_mesh(plan, runtime.device)
        self.model = build_model(config.model, build_hf_config(config.model))
        weights = build_weights(config.model, self.model, seed=config.train.seed)
        self.module = parallelize(self.model, config, plan, self.mesh)
        materialize(self.model, weights, device=self._home(), dtype=torch_dtype(plan.master_dtype))
        if not plan.fully_sharded and plan.degree("dp_replicate") > 1:
            self.module = apply_ddp(self.model, plan, runtime)
        self.model.train()
        # Kept: after a forward that leaves FSDP's parameters gathered, the module would name other tensors.
        self.named = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(param_groups(self.named.items(), config.optimizer.weight_decay), config.optimizer)

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=valid_tokens.device, dtype=torch.float64)
        # DDP and FSDP2 average over the ranks; the loss is a sum over them.
        factor = self.plan.data_parallel_size * (self.loss_scale.value if self.loss_scale else 1.0)
        for number, batch in enumerate(micro_batches, start=1):
            with self._synchronise(last=number == len(micro_batches)):
                loss = self._loss(self.module, batch) / valid_tokens
                (loss * factor).backward()
            total += loss.detach()
        return total

    def step(self, lr: float) -> StepReport:
        scale = self.loss_scale.value if self.loss_scale else None
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = gradients.global_norm(grads, mesh=self.mesh, device=self.runtime.device) / (scale or 1.0)
        finite = math.isfinite(grad_norm)
        if self.loss_scale:
            self.loss_scale.update(finite=finite)
        if finite:
            gradients.scale(grads, self._clip_factor(grad_norm) / (scale or 1.0))
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
        for name, parameter in self.named.items():
            complete = torch_state.whole(parameter, self.runtime.device)
            yield name, complete.cpu() if self.runtime.is_main else None

    def state(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        everyone = list(range(self.runtime.world_size))
        yield from torch_state.save_state(self.named, self.optimizer, holders=everyone, device=self.runtime.device)

    def counters(self) -> Counters:
        return Counters(
            optimizer_steps=torch_state.optimizer_steps(self.named, self.optimizer),
            loss_scale=self.loss_scale.value if self.loss_scale else None,
            good_steps=self.loss_scale.good_steps if self.loss_scale else None,
        )

    def load_state(self, saved: TensorReader, counters: Counters) -> None:
        torch_state.load_state(self.named, self.optimizer, saved, steps=counters.optimizer_steps)
        if self.loss_scale:
            self.loss_scale.restore(counters.loss_scale, counters.good_steps)

    def close(self) -> None:
        """Nothing is held outside the process."""

    def _home(self) -> torch.device:
        """Where the parameters live between their uses."""
        offloaded = self.plan.offload_parameters is not OffloadDevice.none
        return torch.device("cpu") if offloaded else self.runtime.device

    def _loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        # FSDP2 casts by its own policy; autocast on top would cast again.
        with nullcontext() if self.plan.fully_sharded else autocast(self.plan):
            logits = module(input_ids=batch.input_ids, use_cache=False).logits
        return cross_entropy_sum(logits, batch.labels)

    def _synchronise(self, *, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch's backward may average over replicas; `no_sync` must cover the forward too."""
        if isinstance(self.module, FSDPModule):
            set_last_micro_batch(self.module, self.plan, last=last)
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def _clip_factor(self, grad_norm: float) -> float:
        """torch.nn.utils.clip_grad_norm_'s factor, with its 1e-6 against division by zero."""
        return min(1.0, self.clip_grad_norm / (grad_norm + 1e-6)) if self.clip_grad_norm else 1.0
