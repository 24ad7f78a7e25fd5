"""The work of a rank in a memory test: the real engine runs two steps, and every storage is counted."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from configs.choices import DType, EngineName
from tests.support.balance import balance
from tests.support.deepspeed_cases import allow_float16
from tests.support.harness import Overrides, composed, composes
from trainer.data import Batch
from trainer.engine import build_engine
from trainer.estimate.tracker import StorageTracker
from trainer.make_plan import make_plan
from trainer.optim.table import ask
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world

STEPS = 2


@dataclass
class Measured:
    """Bytes of tensors on this rank.

    peak: maximum during the steps.
    after: bytes after the last update.
    """

    peak: int
    after: int


@composes
def measure(overrides: Overrides) -> Measured:
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    if plan.engine is EngineName.deepspeed and plan.param_dtype is DType.float16:
        allow_float16()
    shape = (plan.batch.micro_batch_size, plan.batch.seq_len)
    with join_world(plan, timeout_minutes=1) as runtime:
        tokens = [torch.randint(0, 100, shape) for _ in range(plan.batch.gradient_accumulation_steps)]
        # With a document mask, each row holds two documents.
        positions = (
            (torch.arange(shape[1]) % (shape[1] // 2)).repeat(shape[0], 1) if config.data.document_mask else None
        )
        batches = [Batch(rows, rows, positions) for rows in tokens]
        valid_tokens = torch.tensor(float(plan.batch.tokens), dtype=torch.float64)
        with StorageTracker() as tracker:
            engine = build_engine(config, plan, runtime)
            # The start-up check of a tensor plan leaves small cycles. Free them now, not at a random collection.
            gc.collect()
            built = len(tracker.events)
            for _ in range(STEPS):
                engine.forward_backward(batches, valid_tokens)
                engine.step(1e-3)
            if config.train.eval_samples and ask(config.optimizer).average(config.optimizer) is not None:
                # A validation with averaged weights also keeps the training weights, so its peak is the highest.
                with engine.averaged():
                    engine.evaluate(batches[0])
        engine.close()
    totals = [total for _, total in balance(tracker.events)]
    return Measured(peak=max(totals[built - 1 :]), after=totals[-1])
