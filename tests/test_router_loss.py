"""`model.config.output_router_logits=true`: the balancing loss of a mixture of experts is transformers' own, and in the
loss of the layouts that can add it; the others refuse it."""

from __future__ import annotations

import functools

import pytest
import torch

from configs.errors import ConfigError, PlanError
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.cases import Trained, train
from tests.support.harness import run_ranks
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model
from trainer.model.router_loss import router_coefficient
from trainer.plan.machine import Machine, find_machine
from trainer.process.runtime import join
from trainer.run.step import train_step

MODELS = {
    "mixtral": ["model.config.num_local_experts=4"],
    "qwen3_moe": [
        "model.config.num_experts=4",
        "model.config.moe_intermediate_size=32",
        "model.config.num_experts_per_tok=2",
    ],
}
ROUTER = ["model.config.output_router_logits=true", "model.config.router_aux_loss_coef=0.5"]
COMMON = ["model=tiny", "data=synthetic", "data.seq_len=32", "data.ignore_fraction=0.6", "train.micro_batch_size=2"]
COMMON += ["train.eval_samples=2", "train.clip_grad_norm=0.25", "train.steps=2", "optimizer.lr=3e-3"]


def words(kind: str, *extra: str) -> list[str]:
    return [*COMMON, f"model.config.model_type={kind}", *MODELS[kind], *extra]


def beside_transformers(overrides: list[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of step 1: the trainer's, and those of transformers' model called with labels."""
    config = load_config(overrides)
    plan = make_plan(config, find_machine())
    with join(plan, timeout_minutes=1) as runtime:
        vocabulary = build_hf_config(config.model).vocab_size
        batches = next(build_data(config, plan, data_rank=0, vocab_size=vocabulary).steps())
        engine = build_engine(config, plan, runtime)
        valid, plain = sum(batch.valid_tokens() for batch in batches), 0.0
        for batch in batches:
            labels = {"labels": batch.labels, "shift_labels": batch.labels, "num_items_in_batch": valid}
            out = engine.model(input_ids=batch.input_ids, use_cache=False, **labels)
            # Called with labels it adds the whole term each time; a step takes its mean.
            surplus = 0.5 * out.aux_loss * (1 - 1 / len(batches))
            (out.loss - surplus).backward()
            plain += (out.loss - surplus).item()
        gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        engine.discard()
        result = train_step(engine, batches, plan, runtime, 1e-3)
        assert result.report is not None
        return [(result.loss, result.report.grad_norm), (plain, norm)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_is_that_of_transformers(kind: str, accumulation: int) -> None:
    extra = [*ROUTER, "parallel=single", f"train.gradient_accumulation_steps={accumulation}"]
    ours, plain = run_ranks(1, beside_transformers, words(kind, *extra))[0]
    assert ours == pytest.approx(plain, rel=1e-5)


def test_float64_trains_with_experts_one_by_one() -> None:
    """torch's grouped product of experts has no float64."""
    losses = run_ranks(1, train, words("mixtral", "precision=fp64"))[0].losses
    assert losses[1] < losses[0] < 6


@functools.cache
def reference(*router: str) -> Trained:
    extra = [*router, "parallel=single", "train.gradient_accumulation_steps=4"]
    return run_ranks(1, train, words("mixtral", *extra))[0]


@pytest.mark.parametrize("layout", ["ddp", "fsdp train.activation_checkpointing=full train.chunked_loss=true"])
def test_layouts_with_the_same_micro_batches_have_the_same_loss(layout: str) -> None:
    extra = [*ROUTER, "train.gradient_accumulation_steps=2", *f"parallel={layout}".split()]
    found, expected = run_ranks(2, train, words("mixtral", *extra))[0], reference(*ROUTER)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)


def test_the_coefficient_counts_and_validation_leaves_it_out() -> None:
    with_it, without = reference(*ROUTER), reference()
    # The term is near 1 * top_k = 2 for routes that are nearly even.
    assert with_it.losses[0] - without.losses[0] == pytest.approx(0.5 * 2, abs=0.1)
    assert abs(with_it.validation - without.validation) < 0.1
    assert with_it.losses[1] != without.losses[1]


REASON = (
    r"leaves out the balancing loss that model.config.output_router_logits=true adds \(with model.config.router_aux"
)


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "context", "zero2", "3d"])
def test_layouts_that_would_leave_it_out_are_refused(layout: str) -> None:
    with pytest.raises(PlanError, match=rf"^parallel\.\w+=\w+: {REASON}"):
        make_plan(load_config(words("mixtral", ROUTER[0], f"parallel={layout}")), Machine(gpus=8))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.config.output_router_logits=true train.compile=true",
            r"^train.compile=true: loses the router's logits",
        ),
        ("model.config.router_aux_loss_coef=10", r"^model.config.router_aux_loss_coef=10: is read with .*=true only"),
    ],
)
def test_what_would_have_no_effect_is_refused(override: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(load_config(words("mixtral", *override.split())), Machine(gpus=2))


def test_a_model_without_such_a_loss_is_refused() -> None:
    config = load_config(
        ["model=tiny", "model.config.model_type=llama4_text", "model.config.output_router_logits=true"]
    )
    with pytest.raises(ConfigError, match=r"^model.config.output_router_logits=true: transformers' code of Llama4"):
        router_coefficient(build_model(config.model, build_hf_config(config.model)))


def test_the_estimate_says_that_it_leaves_it_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_estimate(words("mixtral", *ROUTER, "parallel=ddp", "cluster=8xh100")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.config.output_router_logits=true: the balancing loss keeps a table of routes")
