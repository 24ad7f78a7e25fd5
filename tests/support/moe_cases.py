"""The work of a rank in a test of balancing: a short run on padded samples, and a comparison with transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.support.cases import Trained, train
from tests.support.harness import Overrides, composed, composes, run_ranks
from tests.support.mutations import BUGS
from tests.support.parity import ROWS, Distance, Row, distance, words
from tests.support.shared import once
from trainer.data import IGNORED, Batch
from trainer.data.build import build_data
from trainer.data.samples import SyntheticSamples
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step

KINDS = {
    "mixtral": ["model.config.num_local_experts=4"],
    "qwen3_moe": [
        "model.config.num_experts=4",
        "model.config.moe_intermediate_size=32",
        "model.config.num_experts_per_tok=2",
    ],
}
EXPERTS = ("model.config.model_type=qwen3_moe", *KINDS["qwen3_moe"])
STEPS = 3
COEFFICIENT = 0.5


@contextmanager
def padded_samples() -> Iterator[None]:
    """Give synthetic samples ragged lengths, like those of conversations."""
    read = SyntheticSamples.read

    def padded(self: SyntheticSamples, numbers: Any) -> Batch:
        batch = read(self, numbers)
        lengths = self.seq_len - torch.from_numpy(numbers % 5) * (self.seq_len // 8)
        batch.labels[torch.arange(self.seq_len) >= lengths[:, None]] = IGNORED
        return replace(batch, lengths=lengths)

    with patch.object(SyntheticSamples, "read", padded):
        yield


@composes
def train_padded(overrides: Overrides, bug: str = "none") -> Trained:
    with padded_samples(), BUGS[bug]():
        return train(overrides)


@once
def expected(*extra: str) -> Trained:
    """Train one process on the same global batch."""
    return run_ranks(1, train_padded, words("llama", "single", "fp64", STEPS, *EXPERTS, *extra))[0]


@once
def found(layout: str, processes: int, bug: str, *extra: str) -> Trained:
    ranks = run_ranks(processes, train_padded, words("llama", layout, "fp64", STEPS, *EXPERTS, *extra), bug)
    assert all((rank.losses, rank.grad_norms) == (ranks[0].losses, ranks[0].grad_norms) for rank in ranks)
    return ranks[0]


def apart(layout: str, processes: int, keys: tuple[str, ...], balance: tuple[str, ...], bug: str = "none") -> Distance:
    """Distance of a layout from one process.

    keys: overrides of the layout. One process gets all but `parallel.*` and `train.activation*`.
    balance: overrides of the balancing, for both.
    """
    shared = tuple(key for key in keys if not key.startswith(("parallel.", "train.activation")))
    far = distance(found(layout, processes, bug, *balance, *keys), expected(*balance, *shared))
    if bug == "none":
        ROWS.append(Row(layout, " ".join([*balance, *keys]), processes, "qwen3_moe", "fp64", far))
    return far


@composes
def beside_transformers(overrides: Overrides) -> list[tuple[float, float]]:
    """Loss and gradient norm of step 1, from the trainer and from transformers' model called with labels."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with padded_samples(), join_world(plan, timeout_minutes=1) as runtime:
        vocabulary = build_hf_config(config.model).vocab_size
        batches = next(build_data(config, plan, data_rank=0, vocab_size=vocabulary).steps())
        engine = build_engine(config, plan, runtime)
        valid, plain = sum(batch.valid_tokens() for batch in batches), 0.0
        text, logits = engine.model.config, []
        experts, top_k = getattr(text, "num_experts", None) or text.num_local_experts, text.num_experts_per_tok
        engine.model.eval()  # in eval mode the trainer attaches nothing
        for batch in batches:
            assert batch.lengths is not None
            real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
            labels = {"shift_labels": batch.labels, "num_items_in_batch": valid}
            out = engine.model(
                input_ids=batch.input_ids, use_cache=False, output_router_logits=True, labels=batch.labels, **labels
            )
            logits = out.router_logits
            # The model's balancing term covers all positions. Replace it by the term of the real tokens.
            surplus = engine.model.router_aux_loss_coef * out.aux_loss
            term = load_balancing_loss_func(logits, experts, top_k, real.long())
            loss = out.loss - surplus + COEFFICIENT * term / len(batches)
            loss.backward()
            plain += loss.item()
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        engine.model.train()
        engine.discard()
        result = train_step(engine, batches, plan, runtime, 1e-3)
        assert result.report is not None
        return [(result.loss, result.report.grad_norm), (plain, norm)]
