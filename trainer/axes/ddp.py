"""Data parallel: every rank holds the whole model and computes the gradient of its part of the batch.

    rank 0   W  ----forward/backward on sequences 0..k----> g0 --\\
    rank 1   W  ----forward/backward on sequences k..2k---> g1 ---+--> all-reduce --> mean(g) on every rank
    ...                                                         --/
    each rank: the same update of W with the same gradient, so the copies never part

Collective: one all-reduce of the gradient per optimizer step, in buckets that leave while the backward still runs.
Bytes per rank and step: 2 * (W - 1) / W * gradient bytes (ring all-reduce). With gradient accumulation only the last
micro-batch communicates. Li et al. 2020, PyTorch Distributed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from configs.choices import DType
from trainer.model.precision import autocast
from trainer.plan.plan import Plan

COMPRESS = {DType.bfloat16: default_hooks.bf16_compress_hook, DType.float16: default_hooks.fp16_compress_hook}


def apply_ddp(
    model: nn.Module, plan: Plan, device: torch.device, objective: Callable[..., torch.Tensor]
) -> DistributedDataParallel:
    """Wrap the model so that its last backward of a step averages the gradient over all ranks.

    objective: loss of the model's output and labels.
    gradient_as_bucket_view: gradients live in the communication buckets; without it they would be stored twice.
    """
    with warnings.catch_warnings():
        # torch 2.13 has a new name for it, which 2.11 does not know.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    if plan.reduce_dtype is not plan.master_dtype:
        wrapped.register_comm_hook(None, COMPRESS[plan.reduce_dtype])
    _settle_buckets(wrapped, plan, device, objective)
    return wrapped


def _settle_buckets(
    wrapped: DistributedDataParallel, plan: Plan, device: torch.device, objective: Callable[..., torch.Tensor]
) -> None:
    """One backward whose gradient is dropped, without changing the random state.

    After its first backward DDP rebuilds the buckets in the order in which gradients arrived. A gradient's place in its
    bucket decides the order of the sum over ranks, so a resumed run would repeat its first step with other rounding
    than an uninterrupted one.
    """
    shape = (plan.batch.micro_batch_size, plan.batch.seq_len)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast(plan):
        ids = torch.zeros(shape, dtype=torch.long, device=device)
        objective(partial(wrapped, input_ids=ids, use_cache=False), ids).backward()
    wrapped.zero_grad(set_to_none=False)
