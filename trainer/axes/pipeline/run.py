"""Pipeline parallel: each rank holds some of the layers; micro-batches flow through them as on an assembly line.

    rank 0   embedding, layers 0-7             012....aA3bB4cC5dD.eE.fF
                | hidden states   ^ gradient
    rank 1   layers 8-15                       .01..aA2bB3cC4dD5eE.fF..
                | hidden states   ^ gradient
    rank 2   layers 16-23, norm, head, loss    ..0aA1bB2cC3dD4eE5fF....    3: forward of micro-batch 3, dD: its backward
                                               time -->                    other schedules: `timeline`

Communication: point to point, only between neighbours. Per micro-batch and border between stages one send of the hidden
states (batch * seq * hidden_size elements in the compute dtype) and one of their gradient: far less than tensor or
sharded data parallel send, so pp ranks may be on different nodes. Every rank reads the same samples; the first uses
the tokens, the last the labels, the others only the shape.

Gradients: each rank accumulates those of its micro-batches and under data parallel reduces once, after the last.
Sharded data parallel therefore shards parameters and optimizer states here, and gradients only between steps: within a
step a rank holds unsharded gradients of its layers, and their parameters gathered. Tied embeddings are two copies, on
the first and the last stage; their gradients (vocabulary * hidden_size) are exchanged and added once per step, so that
both make the same update and stay equal. If layers get embeddings of their own besides the hidden states (Gemma 3n and
4), every stage computes them from the tokens: a copy of the tables on each, whose gradients are summed over all.

Further memory: the activations of the micro-batches in flight, and receive buffers (`in_flight`, `receive_buffers`), as
many as are in use at once. Their number does not depend on the micro-batches of a step, except for the schedules that
hold all of them anyway.

torch.distributed.pipelining runs the schedule. It does not scale gradients, because the loss is normalised already.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from configs.schema import Config
from trainer.axes import CONTEXT, PIPELINE
from trainer.axes.gradients import local
from trainer.axes.pipeline.split import Stage
from trainer.axes.pipeline.stage import EngineStage, Spare
from trainer.axes.pipeline.table import SCHEDULES, rank_of_stage
from trainer.data import Batch
from trainer.model.noise import numbered
from trainer.model.precision import torch_dtype
from trainer.plan.plan import Plan

RUNNERS: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "looped_bfs": ScheduleLoopedBFS,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv_zero_bubble": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class PipelineRun:
    """This rank's stages and the schedule that drives them, for micro-batches of one shape."""

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        group: dist.ProcessGroup,
        schedule: str,
        micro_batches: int,
        micro_batch_size: int,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        disturbs: bool = False,
    ) -> None:
        """stages: from `split_model`, after all passes over their modules. group: of the mesh axis pp. seq_len: tokens
        that a rank sees. dtype: of hidden states between stages, which is the layers' compute dtype. Only the shapes
        are fixed here; parameters may still be on the meta device."""
        self.stages = list(stages)
        self.group = group
        self.pp = group.size()
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.shape = (micro_batch_size, seq_len)
        self.dtype = dtype
        self.disturbs = disturbs
        self.device = device
        self.modules: list[nn.Module] = [stage.module for stage in self.stages]
        self.holds_first = self.stages[0].is_first
        self.holds_last = self.stages[-1].is_last
        for stage in self.stages:
            stage.border.dtype = dtype
        self.spare: Spare = defaultdict(list)
        engine_stages = [self._engine_stage(stage) for stage in self.stages]
        single = SCHEDULES[schedule].arrangement == "one"
        self.runner = RUNNERS[schedule](
            engine_stages[0] if single else engine_stages,
            micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def forward_backward(
        self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor, *, factor: float
    ) -> torch.Tensor:
        """Run the schedule over one step's micro-batches and leave the gradient of factor * loss in the parameters.

        The loss is the last stage's result over all micro-batches, divided by valid_tokens. Returns this rank's share
        of it without the factor (float64, detached): zero on ranks without the last stage. A collective over the
        pipeline.
        """
        for batch in micro_batches:
            assert batch.input_ids.shape == self.shape, "a pipeline is built for one shape of micro-batch"
        assert len(micro_batches) == self.micro_batches
        self._valid_tokens, self._factor = valid_tokens, factor
        self._total = torch.zeros((), dtype=torch.float64, device=self.device)
        inputs = (torch.cat([batch.input_ids for batch in micro_batches]),) if self.holds_first else ()
        labels = torch.cat([batch.labels for batch in micro_batches]) if self.holds_last else None
        extras = [self._extras(batch) for batch in micro_batches]
        joined = {name: torch.cat([extra[name] for extra in extras]) for name in extras[0]}
        if labels is not None:
            joined["targets"] = labels
        self.runner.step(*inputs, target=labels, return_outputs=False, **joined)
        self.sum_tied_gradients()
        return self._total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss of one batch of any shape, forward only: the same number on every rank of the pipeline (float64).
        The batch passes the stages one after the other. A collective over the pipeline."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        hidden = torch.empty(0)
        for stage in self.stages:
            stage.module.eval()
            if stage.is_first:
                hidden = batch.input_ids
            elif (before := self._rank_of(stage.index - 1)) != self.group.rank():
                hidden = torch.empty(*batch.input_ids.shape, *stage.hidden, dtype=self.dtype, device=self.device)
                dist.recv(hidden, group=self.group, group_src=before)
            hidden = stage.module(hidden, targets=batch.labels, **self._extras(batch))
            if stage.is_last:
                loss.copy_(hidden)
            elif (after := self._rank_of(stage.index + 1)) != self.group.rank():
                dist.send(hidden, group=self.group, group_dst=after)
            stage.module.train()
        dist.broadcast(loss, group=self.group, group_src=self._rank_of(self.stages[0].count - 1))
        return loss

    def sum_tied_gradients(self) -> None:
        """Add the gradients of the copies of each tied parameter, on every copy. `forward_backward` calls it."""
        for name in self.stages[0].tied or self.stages[-1].tied:
            ends = [stage for stage in self.stages if name in stage.tied]
            if not ends[0].module.get_parameter(name).requires_grad:
                continue
            gradients = [_gradient(stage.module, name) for stage in ends]
            if ends[0].repeated:
                self._sum(gradients[0])
            elif len(gradients) == 2:
                gradients[0].add_(gradients[1])
                gradients[1].copy_(gradients[0])
            else:
                gradients[0].add_(self._exchange(gradients[0], first=ends[0].is_first))

    def copies(self) -> Iterator[nn.Parameter]:
        """This rank's second copies of tied parameters. They are trained like all others, but excluded from the global
        norm, which counts the first copy."""
        for stage in self.stages:
            for name in stage.copies:
                yield stage.module.get_parameter(name)

    def _sum(self, tensor: torch.Tensor) -> None:
        """Over all stages: each rank has one."""
        total = tensor.to(self.device)
        dist.all_reduce(total, group=self.group)
        if total is not tensor:
            tensor.copy_(total)

    def _exchange(self, tensor: torch.Tensor, *, first: bool) -> torch.Tensor:
        """The corresponding tensor of the rank at the other end of the pipeline."""
        # A gradient that is offloaded to the host is sent through the device.
        mine = tensor.to(self.device)
        other = torch.empty_like(mine)
        peer = self._rank_of(self.stages[0].count - 1 if first else 0)
        operations = [
            dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return other.to(tensor.device)

    def _extras(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch's inputs for the model's code besides tokens and labels: every stage gets them."""
        positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
        tokens = {"tokens": batch.input_ids} if self.stages[0].repeated else {}
        return positions | tokens | numbered(batch, wanted=self.disturbs)

    def _loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = output / self._valid_tokens
        self._total += loss.detach()
        return loss * self._factor

    def _rank_of(self, stage: int) -> int:
        return rank_of_stage(self.schedule, pp=self.pp, stage=stage)

    def _engine_stage(self, stage: Stage) -> EngineStage:
        """With given shapes, it need not run a micro-batch to find them."""
        tokens = torch.empty(self.shape, dtype=torch.int64, device="meta")
        hidden = torch.empty(*self.shape, *stage.hidden, dtype=self.dtype, device="meta", requires_grad=True)
        made = EngineStage(
            stage.module,
            stage.index,
            stage.count,
            self.device,
            input_args=tokens if stage.is_first else hidden,
            # The last stage's output is never sent, so any shape works here.
            output_args=hidden,
            group=self.group,
        )
        made.spare = self.spare
        return made


def build_pipeline(stages: Sequence[Stage], config: Config, plan: Plan, mesh: DeviceMesh) -> PipelineRun:
    """The pipeline of a plan, over stages that all passes have been applied to."""
    return PipelineRun(
        stages,
        group=mesh.get_group(PIPELINE),
        schedule=config.parallel.pipeline.schedule,
        micro_batches=plan.batch.gradient_accumulation_steps,
        micro_batch_size=plan.batch.micro_batch_size,
        seq_len=plan.batch.seq_len // plan.degree(CONTEXT),
        dtype=torch_dtype(plan.param_dtype),
        disturbs=config.train.neftune_alpha > 0,
        device=torch.device(mesh.device_type, torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
    )


def _gradient(module: nn.Module, name: str) -> torch.Tensor:
    """This rank's piece of a parameter's gradient. A stage may not use a parameter that another stage needs."""
    parameter = module.get_parameter(name)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)
