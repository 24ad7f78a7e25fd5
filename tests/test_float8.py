"""`precision=fp8` gives equal results under every layout that shards no matrix and close results where one is sharded.
It stays close to bfloat16 over a longer run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError, EnvironmentProblem, PlanError
from configs.load import load_config
from tests.support.cases import run_trainer, train, train_compiled
from tests.support.float8_cases import count_products, cut_products, train_with_the_loss_of_a_stage
from tests.support.harness import run_ranks
from tests.support.model_folders import tensors_of
from tests.support.parity import MODELS, Trained, distance, reference, words
from tests.support.selection import rows
from trainer.linear import float8
from trainer.make_plan import make_plan
from trainer.passes import prepare_model
from trainer.plan.machine import Machine

STEPS, EXACT = 4, 2
FLOAT32, NEAR, LONG = 1e-5, 5e-3, 50
WIDE = "precision.param_dtype=float32"
"""Runs everything outside float8 in float32, so a difference can only come from the scales."""
ONE_AT_A_TIME = "train.micro_batch_size=2"
"""Each micro-batch has its own tensorwise scales, so the single process must use the same micro-batches."""
EQUAL: dict[str, int] = {
    **{"ddp": 2, "fsdp": 2, "fsdp precision.float8.all_gather=false": 2, "hsdp": 4, "fsdp_offload": 2},
    **{"fsdp parallel.reshard_after_forward=false": 2, "fsdp train.activation_checkpointing=selective": 2},
    **{"pipeline": 2, "pipeline parallel.pipeline.schedule=interleaved_zero_bubble": 2, "pipeline_fsdp": 4},
}
OFTEN = {"ddp", "fsdp", "pipeline"}
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
CUT = {"tensor": 2, "tensor parallel.sequence_parallel=true": 2, "tensor_fsdp": 4, "context": 2, "3d": 8}


def keys(recipe: str = "tensorwise") -> tuple[str, ...]:
    return (f"precision.float8.recipe={recipe}", WIDE, ONE_AT_A_TIME)


def assert_equal(found: Trained, expected: Trained, exact: int = EXACT) -> None:
    """The runs are equal in the first steps and close in all steps. The last bit of a gradient depends on the summation
    order, which depends on the layout and the processor. In a later step that bit may flip a float8 code, which changes
    the gradient norm by some percent."""
    pairs = [*zip(found.losses[:exact], expected.losses[:exact], strict=True)]
    pairs += zip(found.grad_norms[:exact], expected.grad_norms[:exact], strict=True)
    assert all(abs(a / b - 1) <= FLOAT32 for a, b in pairs), pairs
    apart = distance(found, expected)
    assert apart.loss <= NEAR and apart.grad_norm <= 0.1, apart


@pytest.mark.parametrize("layout", rows(zip(EQUAL), lambda layout: layout in OFTEN))
def test_layout_equals_single_process(layout: str) -> None:
    preset, *more = layout.split()
    ranks = run_ranks(EQUAL[layout], train, words("llama", preset, "fp8", STEPS, *keys(), *more))
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    expected = reference("llama", "fp8", STEPS, *keys())
    if preset.startswith("pipeline"):
        single = words("llama", "single", "fp8", STEPS, *keys())
        expected = run_ranks(1, train_with_the_loss_of_a_stage, single)[0]
    assert_equal(ranks[0], expected)
    plain = reference("llama", "fp32", STEPS, ONE_AT_A_TIME)
    assert abs(reference("llama", "fp8", STEPS, *keys()).losses[0] - plain.losses[0]) > 1e-5, "nothing is in float8"


def test_compiled_layers_multiply_in_float8_too() -> None:
    """torch traces the layers without code generation. Traced layers cast and scale like eager ones."""
    expected = reference("llama", "fp8", STEPS, *keys())
    found, graphs = run_ranks(1, train_compiled, words("llama", "single", "fp8", STEPS, *keys(), "train.compile=true"))[
        0
    ]
    assert graphs > 0, "nothing was compiled"
    apart = distance(found, expected)
    assert max(apart.loss, apart.grad_norm) <= FLOAT32, apart


def test_blocks_are_the_same_wherever_a_matrix_is_cut() -> None:
    """Two ranks hold halves, split at a multiple of 32. Concatenated products are bit-identical to a single process;
    summed products differ only by the summation order."""
    joined, added, rounded = run_ranks(1, cut_products)[0]
    assert joined == 0 and 0 < added < 1e-6 and rounded > 1e-2, (joined, added, rounded)


@pytest.mark.parametrize("layout", rows(zip(("fsdp", "ddp", "tensor")), lambda layout: layout == "fsdp"))
def test_scales_of_blocks_are_those_of_one_process(layout: str) -> None:
    """The test emulates mxfp8. Where a matrix is sharded, the first step still equals a single process up to the
    summation order. In later steps that rounding flips float8 codes."""
    extra = (*keys("mxfp8"), "model.config.hidden_size=128", "model.config.intermediate_size=128")
    found = run_ranks(2, train, words("llama", layout, "fp8", STEPS, *extra))[0]
    assert_equal(found, reference("llama", "fp8", STEPS, *extra), exact=1 if layout == "tensor" else EXACT)
    plain = reference("llama", "fp32", STEPS, ONE_AT_A_TIME, *extra[-2:])
    assert abs(reference("llama", "fp8", STEPS, *extra).losses[0] - plain.losses[0]) > 1e-5, "nothing is in float8"


@pytest.mark.parametrize("recipe", rows(zip(("rowwise", "rowwise_with_gw_hp")), lambda recipe: recipe == "rowwise"))
def test_scales_of_rows_are_those_of_one_process(recipe: str) -> None:
    found = run_ranks(2, train, words("llama", "fsdp", "fp8", STEPS, *keys(recipe)))[0]
    assert_equal(found, reference("llama", "fp8", STEPS, *keys(recipe)))


def test_rows_alone_do_not_depend_on_the_micro_batch() -> None:
    """If weight gradients are computed in param_dtype, every scale belongs to one token or to the weight."""
    recipe = ("precision.float8.recipe=rowwise_with_gw_hp", WIDE)
    found = run_ranks(2, train, words("llama", "ddp", "fp8", STEPS, *recipe, ONE_AT_A_TIME))[0]
    expected = reference("llama", "fp8", STEPS, *recipe)
    assert max(abs(a / b - 1) for a, b in zip(found.losses[:EXACT], expected.losses[:EXACT], strict=True)) <= FLOAT32


@pytest.mark.parametrize("layout", rows(zip(CUT), lambda layout: layout == "tensor"))
def test_a_cut_matrix_stays_near_single_process(layout: str) -> None:
    """Each rank computes the scale of its own shard of a matrix or of a sequence."""
    expected, (preset, *more) = reference("llama", "fp8", STEPS, *keys()), layout.split()
    ranks = run_ranks(CUT[layout], train, words("llama", preset, "fp8", STEPS, *keys(), *more))
    assert all(rank.losses == ranks[0].losses for rank in ranks)
    assert max(abs(a - b) for a, b in zip(ranks[0].losses, expected.losses, strict=True)) <= NEAR
    norms = zip(ranks[0].grad_norms, expected.grad_norms, strict=True)
    assert max(abs(a / b - 1) for a, b in norms) <= 0.1


@pytest.mark.parametrize(
    "recipe", rows(zip(("tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8")), lambda r: r == "tensorwise")
)
def test_fifty_steps_stay_near_bfloat16(recipe: str) -> None:
    expected = reference("llama", "bf16", LONG).losses
    found = run_ranks(1, train, words("llama", "single", "fp8", LONG, f"precision.float8.recipe={recipe}"))[0].losses
    assert found != expected
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 0.02
    assert abs(found[-1] - expected[-1]) < 0.1 * (expected[0] - expected[-1])


def test_selective_recompute_keeps_every_second_scaled_product() -> None:
    none, full, selective = (run_ranks(1, count_products, mode)[0] for mode in ("none", "full", "selective"))
    # A layer has seven scaled matmuls; the first, third, fifth and last are kept.
    forward = none // 3
    assert (none, full, selective) == (3 * forward, 4 * forward, 3 * forward + 3 * forward // 7)


def test_a_run_goes_on_under_another_layout_and_in_another_precision(tmp_path: Path) -> None:
    """Checkpoints hold plain parameters, and the scales are computed from the loaded values."""
    common = [*MODELS["llama"], "data.seq_len=32", "train.global_batch_size=8", ONE_AT_A_TIME, WIDE]
    common += ["logging.progress=lines", "checkpoint.every=2", "scheduler=constant", "train.eval_samples=0"]
    common += ["train.steps=4", "precision=fp8"]
    whole, half, rest = tmp_path / "whole", tmp_path / "half", tmp_path / "rest"
    assert run_ranks(1, run_trainer, [*common, f"train.run_dir={whole}"]) == [0]
    first = [*common, "parallel=fsdp", "train.steps=2", f"train.run_dir={half}"]
    assert run_ranks(2, run_trainer, first) == [0, 0]
    second = [*common, "parallel=pipeline", f"train.run_dir={rest}", f"train.resume={half}"]
    assert run_ranks(2, run_trainer, second) == [0, 0]
    expected, found = tensors_of(whole / "model"), tensors_of(rest / "model")
    assert expected.keys() == found.keys()
    # A gradient that is summed in another order may round a value to the adjacent 8-bit code.
    apart = [(expected[name] - found[name]).abs().max() / expected[name].abs().max() for name in expected]
    assert max(apart) <= 1e-3
    plain = [*common, "precision=bf16", "train.steps=3", f"train.run_dir={tmp_path / 'bf16'}", f"train.resume={half}"]
    assert run_ranks(1, run_trainer, plain) == [0]


def converted(*overrides: str) -> set[str]:
    model = prepare_model(load_config(["model=tiny", "precision=fp8", *overrides]))
    kind = float8.layers().Linear8
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kind)}


def test_what_is_converted_and_what_is_left_out() -> None:
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert converted() == attention | mlp
    assert converted("model.config.intermediate_size=360") == attention
    assert converted("parallel=tensor", "model.config.intermediate_size=336") == attention
    assert converted("precision.float8.exclude=[down_proj]") == attention | mlp - {"down_proj"}
    assert converted("precision.float8.head=true", "model.config.vocab_size=288") == attention | mlp | {"lm_head"}
    assert converted("precision.float8.head=true", "model.config.vocab_size=261") == attention | mlp
    # Routers and experts are left out.
    mixture = ("model.config.model_type=qwen3_moe", "model.config.num_experts=16", "model.config.num_experts_per_tok=2")
    assert converted(*mixture, "model.config.moe_intermediate_size=32") == attention


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("model=tiny_gpt2", "precision.float8.recipe=tensorwise: GPT2LMHeadModel has no torch.nn.Linear"),
        (
            "precision.float8.exclude=[o_proj,x_proj]",
            "precision.float8.exclude=['o_proj', 'x_proj']: x_proj matches no",
        ),
        ("precision.float8.head=true model.config.tie_word_embeddings=true", "precision.float8.head=true: the head of"),
    ],
)
def test_a_model_that_cannot_be_converted_is_one_line(overrides: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_model(load_config(["model=tiny", "precision=fp8", *overrides.split()]))
    (problem,) = caught.value.problems
    assert problem.startswith(line)


@pytest.mark.parametrize(
    ("overrides", "key", "remedy"),
    [
        ("parallel=zero2", "precision.float8.recipe=tensorwise: DeepSpeed", "parallel=fsdp"),
        ("optimizer.in_backward=true", "precision.float8.recipe=tensorwise: takes", "set it to false"),
        ("tuning=lora", "precision.float8.recipe=tensorwise: converts", "tuning=full"),
        ("tuning=qlora", "precision.float8.recipe=tensorwise: converts", "tuning=full"),
        ("precision.param_dtype=float16", "precision.float8.recipe=tensorwise: multiplies", "bfloat16"),
        ("precision.float8.recipe=mxfp8 cluster.gpu=H200", "precision.float8.recipe=mxfp8: H200", "B200"),
        ("precision.float8.recipe=mxfp8 data.seq_len=48", "data.seq_len=48: float8", "a multiple of 32"),
        ("data.seq_len=100", "data.seq_len=100: float8", "a multiple of 16"),
        ("parallel=context data.seq_len=48", "data.seq_len=48: float8", "a multiple of 32"),
        ("precision.float8.all_gather=true", "precision.float8.all_gather=true: parallel=ddp", "parallel=fsdp"),
        (
            "parallel=fsdp precision.float8.all_gather=true parallel.fsdp.reshard_size=2",
            "precision.float8.all_gather=true: FSDP2 keeps no part",
            "null",
        ),
        (
            "parallel=fsdp precision.float8.recipe=rowwise precision.float8.all_gather=true",
            "precision.float8.all_gather=true: a part",
            "tensorwise",
        ),
        ("precision=bf16 precision.float8.head=true", "precision.float8.head=true: is for", "precision=fp8"),
        (
            "precision=bf16 precision.float8.exclude=[o_proj]",
            "precision.float8.exclude=['o_proj']: is",
            "precision=fp8",
        ),
        ("cluster.gpu=A100-SXM-80GB", "precision.float8.recipe=tensorwise: A100-SXM-80GB has no", "precision=bf16"),
        ("cluster=2xrtx3090", "precision.float8.recipe=tensorwise: RTX-3090", "H100"),
    ],
)
def test_where_it_cannot_run_is_one_line(overrides: str, key: str, remedy: str) -> None:
    config = load_config(["parallel=ddp", "precision=fp8", *overrides.split()])
    with pytest.raises(PlanError) as caught:
        make_plan(config, Machine(world_size=2, local_world_size=2))
    (line,) = [line for line in caught.value.problems if line.startswith(key)]
    assert remedy in line.partition(";")[2]


def test_the_plan_says_what_is_in_float8() -> None:
    config = load_config(["precision=fp8", "parallel=tensor", "precision.float8.exclude=[o_proj]"])
    text = make_plan(config, Machine(world_size=2, local_world_size=2)).describe()
    (line,) = [line for line in text.splitlines() if line.startswith("layers ")]
    assert "float8, tensorwise; in bfloat16 stay embedding, head, o_proj" in line
    assert "that 32 does not divide" in line


def test_without_torchao_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"^precision=fp8: needs torchao; pip install '[\w-]+\[float8\]'$"):
        prepare_model(load_config(["model=tiny", "precision=fp8"]))


def test_a_gpu_without_float8_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match=r"A100.* has no unit for float8 \(compute capability 8\.0\).*bf16"):
        float8.layers().check_device("NVIDIA A100-SXM4-80GB", (8, 0))
    float8.layers().check_device("NVIDIA L4", (8, 9))
    with pytest.raises(EnvironmentProblem, match=r"recipe=mxfp8: NVIDIA H200 has no unit for it .*use tensorwise"):
        float8.layers().check_device("NVIDIA H200", (9, 0), blocks=True)
    assert torch.finfo(torch.float8_e4m3fn).max == 448
