"""DeepSpeed engine: ZeRO 1, 2, 3 with offload to host memory or NVMe (Rajbhandari et al. 2020, 2021).

    stage   on each of W ranks, of P parameters                                 may be offloaded
    1       parameters and gradient whole; master weights, Adam's states P / W  the optimizer's
    2       parameters whole; gradient and the optimizer's P / W                the optimizer's
    3       everything P / W, parameters gathered module by module              the optimizer's, parameters

DeepSpeed owns partitions, collectives and the order of the update. Model, values, loss, optimizer, learning rate and
loss scale are the same objects as under the torch engine, so the two differ only in layout. In 16 bit:

    stage               a micro-batch's gradient       crosses the ranks in           adds up in
    1                   param_dtype                    reduce_dtype, once a step      float32, whole
    2                   param_dtype, divided by W      reduce_dtype, each backward    float32, P / W
    3                   reduce_dtype, divided by W     reduce_dtype, each backward    float32, P / W

Master weights are float32 copies of the parameters after rounding to param_dtype; the torch engine starts from the
float32 values. A checkpoint in 16 bit is the same for both.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.choices import OffloadDevice
from configs.schema import Config
from trainer import linear
from trainer.axes import TENSOR
from trainer.axes.mesh import build_meshes
from trainer.data import Batch
from trainer.engine.assemble import assemble
from trainer.engine.deepspeed import state as deepspeed_state
from trainer.engine.deepspeed.config import deepspeed_config, model_size
from trainer.engine.deepspeed.preflight import check_deepspeed
from trainer.engine.deepspeed.setup import (
    Partitioner,
    drop_gradient,
    import_deepspeed,
    load_kernels,
    messages_sent,
    needed_kernels,
)
from trainer.engine.deepspeed.swap import SwapFolder
from trainer.engine.deepspeed.tensor import make_plain, model_parallel_unit
from trainer.engine.protocol import Counters, StepReport
from trainer.engine.saved import Saved, read_buffer, write_buffers
from trainer.model.filling import WeightSource, materialize
from trainer.model.noise import numbered
from trainer.model.pieces import join
from trainer.model.precision import apply_tf32, build_loss_scale, torch_dtype
from trainer.optim.build import build_optimizer, learning_rates, set_lr
from trainer.parts import Parts
from trainer.plan.plan import Plan
from trainer.process.runtime import Runtime

log = logging.getLogger(__name__)


class DeepSpeedEngine:
    """Fulfils `trainer.engine.Engine` for ZeRO 1, 2 and 3."""

    def __init__(self, config: Config, plan: Plan, runtime: Runtime) -> None:
        runtime.agree(lambda: check_deepspeed(config, plan))
        deepspeed = import_deepspeed(plan.device)
        runtime.agree(lambda: load_kernels(needed_kernels(config, plan), local_rank=runtime.local_rank))
        # Uses the process group that `runtime.join_world` has made; zero.Init needs it before `initialize`.
        deepspeed.init_distributed(verbose=False)
        apply_tf32(config.precision)
        self.plan, self.runtime = plan, runtime
        self.disturbs = config.train.neftune_alpha > 0
        self.loss_scale = build_loss_scale(config.precision)
        self.whole = linear.keeps_model(config)
        self.counts_messages = config.parallel.deepspeed.comms_logger
        path = config.parallel.offload.nvme_path
        swaps = OffloadDevice.nvme in (plan.offload_optimizer, plan.offload_parameters)
        self.swap = SwapFolder(path, runtime) if swaps and path is not None else None
        try:
            self._build(config, deepspeed)
        except BaseException:
            self.close()
            raise

    def _build(self, config: Config, deepspeed: ModuleType) -> None:
        """Fill the model, keeping only this rank's part of each unit, and pass it to DeepSpeed."""
        plan, swap_folder = self.plan, str(self.swap.path) if self.swap else None
        settings: dict[str, Any] = {}

        def fill(module: PreTrainedModel, weights: WeightSource) -> None:
            settings.update(deepspeed_config(config, plan, model_size(module), swap_folder=swap_folder))
            partition = Partitioner(deepspeed, settings) if plan.zero_stage == 3 else None
            dtype = torch_dtype(plan.param_dtype)
            materialize(module, weights, device=self.runtime.device, dtype=dtype, after_unit=partition)

        meshes = build_meshes(plan, self.runtime.device)
        self.mesh = meshes.dense
        zero = partial(self._hand_over, deepspeed, settings)
        parts = assemble(config, plan, self.runtime, meshes, fill=fill, zero=zero)
        self.model, self.objective = parts.model, parts.objective
        self.kinds, self.balancing = parts.kinds, parts.balancing
        self._announce_scale()

    def _hand_over(self, deepspeed: ModuleType, settings: dict[str, Any], parts: Parts) -> None:
        self.cuts = make_plain(parts.model, parts.tensor[0]) if parts.tensor else {}
        unit = model_parallel_unit(self.mesh) if parts.tensor else None
        self.settings = parts.config.optimizer
        self.optimizer = build_optimizer(parts.model.named_parameters(), parts.described, self.settings)
        with redirect_stdout(io.StringIO()):  # its bfloat16 optimizer prints memory readings
            self.engine: Any = deepspeed.initialize(
                model=parts.model, optimizer=self.optimizer, config=settings, mpu=unit
            )[0]

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=valid_tokens.device, dtype=torch.float64)
        if self.balancing is not None:
            factor = self.plan.data_parallel_size * (self.loss_scale.value if self.loss_scale else 1.0)
            self.balancing.begin(micro_batches, factor=factor)
        for number, batch in enumerate(micro_batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss = self._loss(batch) / valid_tokens
            # DeepSpeed averages over the ranks; the loss is a sum over them, and over the micro-batches.
            self.engine.backward(loss * self.plan.data_parallel_size, scale_wrt_gas=False)
            total += loss.detach()
        if self.balancing is not None:
            total = total + self.balancing.finish(self.runtime.rank)
        return total if self._speaks() else torch.zeros_like(total)

    def step(self, lr: float) -> StepReport:
        scale = self.loss_scale.value if self.loss_scale else None
        set_lr(self.optimizer, lr)
        self.engine.step()
        updated = self.engine.was_step_applied()
        if updated and self.balancing is not None:
            self.balancing.commit()
        if not updated:
            # DeepSpeed has done so too, but in 16 bit with offload it forgets a buffer: all later steps would overflow.
            self.discard()
        if self.loss_scale:
            self.loss_scale.update(finite=updated)
            self._announce_scale()
        norm, rates = float(self.engine.get_global_grad_norm()), learning_rates(self.optimizer)
        experts = self.balancing.report() if self.balancing is not None else {}
        return StepReport(grad_norm=norm, updated=updated, loss_scale=scale, learning_rates=rates, experts=experts)

    def discard(self) -> None:
        drop_gradient(self.engine.optimizer)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.engine.eval()
        loss = self._loss(batch)
        self.engine.train()
        return loss if self._speaks() else torch.zeros_like(loss)

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in deepspeed_state.trained(self.model):
            whole = safe_get_full_fp32_param(parameter)
            assert whole is not None, f"{name} is not trained"
            if name in self.cuts:
                whole = join(self.cuts[name].around(whole))
            yield name, whole.cpu() if self.runtime.is_main else None
        for name, whole in deepspeed_state.frozen(self.model, self.cuts) if self.whole else ():
            yield name, whole.cpu() if self.runtime.is_main else None

    def state(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        yield from deepspeed_state.save_state(self.model, self.engine.optimizer, self.cuts, whole=self.whole)
        if self.balancing is not None:
            yield from write_buffers(self.balancing.kept() if self.runtime.is_main else {})

    def counters(self) -> Counters:
        return Counters(
            optimizer_steps=deepspeed_state.optimizer_steps(self.engine.optimizer),
            loss_scale=self.loss_scale.value if self.loss_scale else None,
            good_steps=self.loss_scale.good_steps if self.loss_scale else None,
        )

    def load_state(self, saved: Saved, counters: Counters) -> None:
        stage, steps = self.plan.zero_stage, counters.optimizer_steps
        fresh = deepspeed_state.Fresh(self.settings, steps)
        deepspeed_state.load_state(
            self.model, self.engine.optimizer, saved, self.cuts, stage=stage, fresh=fresh, whole=self.whole
        )
        if self.balancing is not None:
            self.balancing.restore(partial(read_buffer, saved))
        if self.loss_scale:
            self.loss_scale.restore(counters.loss_scale, counters.good_steps)
            self._announce_scale()

    def close(self) -> None:
        # Without a collective: a failed rank closes too, while the others wait for it elsewhere.
        if self.swap is not None:
            self.swap.close()
        for line in messages_sent() if self.counts_messages else ():
            if self.runtime.is_main:
                log.info("messages: %s", line)

    def _loss(self, batch: Batch) -> torch.Tensor:
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        noise = numbered(batch, wanted=self.disturbs)
        run = partial(self.engine, input_ids=batch.input_ids, use_cache=False, **positions, **noise)
        return self.objective(run, batch.labels)

    def _speaks(self) -> bool:
        """Tensor-parallel ranks all know the loss; one of them reports it."""
        return self.plan.coordinates(self.runtime.rank)[TENSOR] == 0

    def _announce_scale(self) -> None:
        """From the next backward on DeepSpeed multiplies the loss by this number, and divides the gradient by it."""
        if self.loss_scale:
            self.engine.optimizer.override_loss_scale(self.loss_scale.value)
