"""Torch-native engine: a Hugging Face model, made parallel by `trainer.passes`, and torch's optimizer.

One step:  for each micro-batch: forward, loss, backward (gradients add up; the last one communicates)
           global norm -> finite? -> clip -> update -> clear
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from configs.choices import OffloadDevice
from configs.schema import Config
from trainer import linear
from trainer.axes import CONTEXT, PIPELINE, REPLICATE, TENSOR, gradients
from trainer.axes.fsdp import average_gradients, set_last_micro_batch
from trainer.axes.mesh import build_meshes
from trainer.axes.pipeline.run import build_pipeline
from trainer.axes.sequence import slice_of
from trainer.data import Batch
from trainer.engine import torch_state
from trainer.engine.assemble import assemble
from trainer.engine.protocol import Counters, StepReport
from trainer.engine.saved import Saved, read_buffer, write_buffers
from trainer.model.filling import WeightSource, materialize
from trainer.model.noise import numbered
from trainer.model.precision import apply_tf32, autocast, build_loss_scale, torch_dtype
from trainer.optim.build import build_optimizer, learning_rates, set_lr
from trainer.optim.placed import averaged
from trainer.optim.table import ask
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime


class TorchEngine:
    """Fulfils `trainer.engine.Engine` for every layout without DeepSpeed.

    model: on the meta device if a pipeline runs its stages instead. named: this rank's parameters by name, each once;
    with adapters only the adapters'. A tied embedding is listed on the first stage only.
    """

    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        apply_tf32(config.precision)
        self.config, self.plan, self.runtime = config, plan, runtime
        self.clip_grad_norm, self.clip_grad_value = config.train.clip_grad_norm, config.train.clip_grad_value
        self.loss_scale = build_loss_scale(config.precision)
        meshes = build_meshes(plan, runtime.device)
        self.mesh = meshes.dense
        # Of the plan: a part of a mesh takes torch longer to make than a collective.
        self.place = plan.coordinates(runtime.rank)
        self.whole = linear.keeps_model(config)
        self.parts = assemble(config, plan, runtime, meshes, fill=self._fill)
        self.model, self.modules, self.ddp = self.parts.model, self.parts.modules, self.parts.ddp
        self.kinds = self.parts.kinds
        self.pipeline = build_pipeline(self.parts.stages, config, plan, self.mesh) if self.parts.stages else None
        self.objective, self.balancing = self.parts.objective, self.parts.balancing
        # Cached now: after a forward that leaves FSDP's parameters gathered, modules expose the unsharded tensors.
        everything = [(name, p) for module in self.modules for name, p in module.named_parameters()]
        self.copies = dict(self._tied_copies(everything))
        kept = [(name, p) for name, p in everything if self.whole or p.requires_grad]
        self.named = {name: p for name, p in kept if self.copies.get(name) is not p}
        replicas = self.mesh.get_group(REPLICATE) if self.ddp is not None else None
        self.optimizer = build_optimizer(everything, self.parts.described, config.optimizer, replicas=replicas)
        self.average = ask(config.optimizer).average(config.optimizer)
        self.states = torch_state.States(self.optimizer, config.optimizer, self.parts.described)
        self._settle()

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        micro_batches = [self._own_slice(batch) for batch in micro_batches]
        # DDP and FSDP2 average over the ranks that share a parameter; the loss is a sum over them.
        factor = self.plan.averaged * (self.loss_scale.value if self.loss_scale else 1.0)
        if self.balancing is not None:
            self.balancing.begin(micro_batches, factor=factor)
        if self.pipeline:
            total = self.pipeline.forward_backward(micro_batches, valid_tokens, factor=factor)
        else:
            total = self._accumulate(micro_batches, valid_tokens, factor)
        for module, tensor in zip(self.modules, self.parts.tensor, strict=False):
            tensor.reduce_partial_gradients(module)
        average_gradients(self.named, self.plan, self.parts.described)
        if self.balancing is not None:
            total = total + self.balancing.finish(self.runtime.rank)
        return total if self._speaks() else torch.zeros_like(total)

    def step(self, lr: float) -> StepReport:
        scale = self.loss_scale.value if self.loss_scale else None
        counted = [p.grad for p in self.named.values() if p.grad is not None]
        grad_norm = gradients.global_norm(counted, mesh=self.mesh, device=self.runtime.device) / (scale or 1.0)
        finite = math.isfinite(grad_norm)
        if self.loss_scale:
            self.loss_scale.update(finite=finite)
        if finite:
            copied = [p.grad for p in self.copies.values() if p.grad is not None]
            gradients.scale([*counted, *copied], self._clip_factor(grad_norm) / (scale or 1.0))
            gradients.clamp([*counted, *copied], self.clip_grad_value)
            set_lr(self.optimizer, lr)
            self.optimizer.step()
            self._settle()
            if self.balancing is not None:
                self.balancing.commit()
        self.discard()
        rates = learning_rates(self.optimizer)
        experts = self.balancing.report() if self.balancing is not None else {}
        return StepReport(grad_norm=grad_norm, updated=finite, loss_scale=scale, learning_rates=rates, experts=experts)

    def discard(self) -> None:
        # Under DDP gradients are views of its buckets; set to None, accumulation would need a second copy.
        self.optimizer.zero_grad(set_to_none=self.ddp is None)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        batch = self._own_slice(batch)
        if self.pipeline:
            loss = self.pipeline.evaluate(batch)
            return loss if self._speaks() and self.place[PIPELINE] == 0 else torch.zeros_like(loss)
        self.model.eval()
        loss = self._loss(self.model, batch)
        self.model.train()
        return loss if self._speaks() else torch.zeros_like(loss)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with averaged(self.optimizer, self.average):
            self._reshard()
            if self.average is not None:
                self._settle()
            yield
        self._reshard()
        if self.average is not None:
            self._settle()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        with averaged(self.optimizer, self.average):
            for name, complete in torch_state.gather_parameters(self.named, self.mesh, self.runtime.device):
                if complete is None or not self.runtime.is_main:
                    yield name, None
                else:  # a copy: the parameter itself may be trained further before the file is written
                    yield name, complete.cpu() if self.average is None else complete.to("cpu", copy=True)

    def state(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        stage = self.place[PIPELINE]
        ranks = range(self.runtime.world_size)
        holders = [rank for rank in ranks if self.plan.coordinates(rank)[PIPELINE] == stage]
        yield from torch_state.save_state(self.named, self.states, holders=holders, device=self.runtime.device)
        if self.balancing is not None:
            yield from write_buffers(self.balancing.kept() if self.runtime.is_main else {})

    def counters(self) -> Counters:
        return Counters(
            optimizer_steps=self.states.steps(self.named),
            loss_scale=self.loss_scale.value if self.loss_scale else None,
            good_steps=self.loss_scale.good_steps if self.loss_scale else None,
        )

    def load_state(self, saved: Saved, counters: Counters) -> None:
        for parameters in (self.named, self.copies):
            torch_state.load_state(parameters, self.states, saved, steps=counters.optimizer_steps)
        self._settle()
        if self.balancing is not None:
            self.balancing.restore(partial(read_buffer, saved))
        if self.loss_scale:
            self.loss_scale.restore(counters.loss_scale, counters.good_steps)

    def close(self) -> None:
        """The engine holds nothing outside the process."""

    def _reshard(self) -> None:
        """FSDP may keep parameters gathered after a forward, which would hide later changes."""
        for module in self.modules if self.average is not None else ():
            for child in module.modules():
                if isinstance(child, FSDPModule):
                    child.reshard()

    def _fill(self, module: PreTrainedModel, weights: WeightSource) -> None:
        # Frozen weights are only read, so they are stored in the compute dtype.
        frozen = None if self.whole else torch_dtype(self.plan.param_dtype)
        dtype = torch_dtype(self.plan.master_dtype)
        materialize(module, weights, device=self._home(), dtype=dtype, frozen_dtype=frozen)

    def _settle(self) -> None:
        linear.settle(self.modules, self.config)

    def _home(self) -> torch.device:
        """Device of the parameters between uses."""
        offloaded = self.plan.offload_parameters is not OffloadDevice.none
        return torch.device("cpu") if offloaded else self.runtime.device

    def _own_slice(self, batch: Batch) -> Batch:
        return slice_of(batch, self.mesh) if self.plan.degree(CONTEXT) > 1 else batch

    def _speaks(self) -> bool:
        """Tensor-parallel ranks all know the loss; one of them reports it."""
        return self.place[TENSOR] == 0

    def _tied_copies(
        self, everything: list[tuple[str, torch.nn.Parameter]]
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        copies = {id(parameter) for parameter in (self.pipeline.copies() if self.pipeline else ())}
        yield from ((name, parameter) for name, parameter in everything if id(parameter) in copies)

    def _accumulate(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor, factor: float) -> torch.Tensor:
        total = torch.zeros((), device=valid_tokens.device, dtype=torch.float64)
        for number, batch in enumerate(micro_batches, start=1):
            with self._synchronise(last=number == len(micro_batches)):
                loss = self._loss(self.ddp or self.model, batch) / valid_tokens
                (loss * factor).backward()
            total += loss.detach()
        return total

    def _loss(self, module: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return self.objective(partial(self._forward, module, batch), batch.labels)

    def _forward(self, module: torch.nn.Module, batch: Batch, **more: torch.Tensor) -> Any:
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        # FSDP2 casts by its own policy; autocast would cast a second time.
        with nullcontext() if self.plan.fully_sharded else autocast(self.plan):
            noise = numbered(batch, wanted=self.config.train.neftune_alpha > 0)
            return module(input_ids=batch.input_ids, use_cache=False, **positions, **noise, **more)

    def _synchronise(self, *, last: bool) -> AbstractContextManager[None]:
        """Only the last micro-batch's backward may average over replicas; `no_sync` must cover the forward too."""
        if isinstance(self.model, FSDPModule):
            set_last_micro_batch(self.model, self.plan, last=last)
        elif self.ddp is not None and not last:
            return self.ddp.no_sync()
        return nullcontext()

    def _clip_factor(self, grad_norm: float) -> float:
        """torch.nn.utils.clip_grad_norm_'s factor, with its 1e-6 against division by zero."""
        return min(1.0, self.clip_grad_norm / (grad_norm + 1e-6)) if self.clip_grad_norm else 1.0
