"""The work of a rank in a test of tuning methods: it trains, returns logits of the tuned model, and exports."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.harness import Overrides, composed, composes
from trainer.checkpoint.hub import export_model
from trainer.data.build import build_data
from trainer.data.tokenizer import no_tokenizer
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step

IDS = torch.arange(24).reshape(2, 12) * 7 % 250


@composes
def train_and_export(overrides: Overrides, folder: Path) -> torch.Tensor:
    """Train `train.steps` steps and export the adapter to `folder`. Returns the logits of IDS."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=261)
        engine = build_engine(config, plan, runtime)
        steps = data.steps()
        for _ in range(config.train.steps):
            train_step(engine, next(steps), plan, runtime, config.optimizer.lr)
        export_model(engine.parameters(), engine.model, no_tokenizer(), folder, dtype=torch.float32)
        with torch.no_grad():
            logits = engine.model.eval()(input_ids=IDS, use_cache=False).logits
        engine.close()
        return logits
