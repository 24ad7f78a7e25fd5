"""Runs one rank of a layout without the other ranks: the real engine on one device, with a fake process group.

Collectives of the fake group return immediately and leave their tensors unchanged, so values are meaningless.
Allocations and frees are the same as on a rank of a real group. On a GPU torch's allocator counts the bytes; on the CPU
the tensors are counted one by one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.load import load_config
from tests.support.balance import balance
from trainer.axes import gradients
from trainer.data import Batch
from trainer.engine import build_engine
from trainer.estimate.compose import STEPS
from trainer.estimate.tracker import StorageTracker
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.process.runtime import Runtime


def measure(rank: int, world_size: int, overrides: Sequence[str]) -> dict[str, int | None]:
    """Peaks of two steps: measured_allocated_bytes and, on a GPU, measured_reserved_bytes (else None)."""
    config = load_config(overrides)
    plan = make_plan(config, Machine(gpus=world_size, world_size=world_size, local_world_size=world_size))
    device = torch.device("cuda:0" if plan.device == "cuda" else "cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world_size))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    runtime = Runtime(rank=rank, local_rank=0, world_size=world_size, device=device)
    shape = (plan.batch.micro_batch_size, plan.batch.seq_len)
    count = plan.batch.gradient_accumulation_steps
    with without_values(), StorageTracker() as tracker:
        engine = build_engine(config, plan, runtime)
        gc.collect()
        tokens = [torch.randint(0, 100, shape, device=device) for _ in range(count)]
        batches = [Batch(rows, rows.clone()) for rows in tokens]
        valid_tokens = torch.tensor(float(plan.batch.tokens), dtype=torch.float64, device=device)
        for _ in range(STEPS):
            engine.forward_backward(batches, valid_tokens)
            engine.step(1e-3)
    if device.type == "cuda":
        return {
            "measured_allocated_bytes": torch.cuda.max_memory_allocated(),
            "measured_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    peak = max(total for _, total in balance(tracker.events))
    return {"measured_allocated_bytes": peak, "measured_reserved_bytes": None}


@contextmanager
def without_values() -> Iterator[None]:
    """Disable the checks that need other ranks' values.

    These are the check of a tensor plan (`tensor_check`) and the check that gradients are finite, which would prevent
    the update. The gradient norm is still computed.
    """
    norm = gradients.global_norm

    def finite_norm(*arguments: Any, **named: Any) -> float:
        norm(*arguments, **named)
        return 1.0

    def agreed(tensor: torch.Tensor, **_: object) -> None:
        tensor.fill_(1)  # a neighbouring pipeline stage would agree on the shapes

    with (
        mock.patch("trainer.passes.self_check"),
        mock.patch.object(gradients, "global_norm", finite_norm),
        mock.patch.object(dist, "recv", agreed),
    ):
        yield
