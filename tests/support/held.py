"""Bytes that a rank holds, per parameter of the whole model, at three moments of a run on the CPU.

The measurement is independent of the layout. It counts every storage from allocation to release. The moments are those
at which no activation is alive. The table in docs/zero-and-fsdp.md is written from it.

    at rest          before the first step: parameters, master weights, and preallocated buffers
    accumulating     step 2, between two micro-batches: also the gradients so far, and the optimizer states
    between steps    after an update: also the optimizer states
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from configs.load import load_config
from tests.support.balance import balance
from tests.support.harness import run_ranks
from trainer.data import Batch
from trainer.engine import build_engine
from trainer.estimate.tracker import StorageTracker
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world

MICRO_BATCHES, SEQ_LEN = 2, 16
COMMON = [
    "model=tiny",
    "data=synthetic",
    f"data.seq_len={SEQ_LEN}",
    "train.micro_batch_size=1",
    f"train.gradient_accumulation_steps={MICRO_BATCHES}",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes per parameter of the whole model, on the rank that holds most."""

    at_rest: float
    accumulating: float
    between_steps: float


def held(overrides: list[str], ranks: int) -> Held:
    """Run two steps under a layout and measure each rank.

    overrides: the layout's preset and further overrides.
    """
    found = run_ranks(ranks, _hold, [*COMMON, *overrides])
    return Held(
        at_rest=max(rank.at_rest for rank in found),
        accumulating=max(rank.accumulating for rank in found),
        between_steps=max(rank.between_steps for rank in found),
    )


def _hold(overrides: list[str]) -> Held:
    config = load_config(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        batches = [Batch(rows, rows) for rows in torch.randint(0, 100, (MICRO_BATCHES, 1, SEQ_LEN))]
        valid_tokens = torch.tensor(float(plan.batch.tokens), dtype=torch.float64)
        with StorageTracker() as tracker:
            engine = build_engine(config, plan, runtime)
            engine.model.register_forward_pre_hook(lambda *_: tracker.mark("forward"))
            for _ in range(2):
                engine.forward_backward(batches, valid_tokens)
                engine.step(1e-3)
                tracker.mark("updated")
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
        engine.close()
    sizes: dict[str, list[float]] = {"forward": [], "updated": []}
    for name, total in balance(tracker.events):
        if name:
            sizes[name].append(total / parameters)
    return Held(at_rest=sizes["forward"][0], accumulating=sizes["forward"][3], between_steps=sizes["updated"][1])
