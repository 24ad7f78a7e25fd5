"""Tensor and sequence parallelism against one process, in float64: architectures, uneven sizes, planted bugs, plans.

test_parity covers whole presets with their engine; this module covers many architectures.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.errors import ConfigError
from configs.load import load_config
from tests.support import tensor_cases
from tests.support.harness import run_ranks
from tests.support.selection import rows
from tests.support.shared import once
from tests.support.tensor_cases import LLAMA, MODELS, Case, Trained
from trainer.axes.tensor import adapters as tensor_adapters
from trainer.axes.tensor.apply import tensor_plan
from trainer.axes.tensor.plans import PLANS, STYLES, check_plan, check_tensor, match, share_of, split_style
from trainer.linear.adapter_layers import add_adapters
from trainer.make_plan import make_plan
from trainer.model.build import tied_names
from trainer.plan.machine import Machine
from trainer.process.runtime import dropout_stream

EXACT = 1e-10
ON_FOUR = ["llama", "llama_tied_odd_vocabulary", "llama_one_kv_head", "llama_two_kv_heads", "qwen3", "gpt2"]
# Only four ranks copy heads of these models or cut their packed matrices. The other models are nightly.
OFTEN_ON_FOUR = {"llama_two_kv_heads", "gpt2"}
OFTEN_ADAPTED = {"gpt2", "opt"}
# These are Llamas under other names, or have heads that two ranks need not copy.
LIKE_OTHERS = {"mistral", "qwen2", "llama_two_kv_heads", "llama", "phi3", "gptj"}
FOLDS_SEQUENCES = {"opt"}


@once
def reference(model: str, *, adapters: bool = False) -> Trained:
    trained = run_ranks(1, tensor_cases.train, [Case(model, adapters=adapters)])[0][0]
    learned = 0.05 if adapters else 0.5
    assert trained.losses[-1] < trained.losses[0] - learned, f"the reference did not train: {trained.losses}"
    assert adapters or max(trained.grad_norms) > tensor_cases.CLIP, "clipping was never active"
    return trained


def distance(found: Trained, expected: Trained) -> float:
    """Return the largest relative difference of losses, norms and parameters.

    A parameter's difference is relative to its tensor's largest element, or to the learning rate if that is larger:
    Adam turns rounding errors of a zero gradient into whole steps.
    """
    assert found.parameters.keys() == expected.parameters.keys()
    numbers = zip(found.losses + found.grad_norms, expected.losses + expected.grad_norms, strict=True)
    tensors = ((found.parameters[name], value) for name, value in expected.parameters.items())
    return max(
        max(abs(a / b - 1) for a, b in numbers),
        max(((a - b).abs().max() / b.abs().max().clamp(min=tensor_cases.LR)).item() for a, b in tensors),
    )


def modes(model: str) -> list[Case]:
    sequence = [] if model in FOLDS_SEQUENCES else [Case(model, sequence_parallel=True)]
    return [Case(model), *sequence]


@pytest.mark.parametrize(
    "model",
    rows(
        ((model,) for model in MODELS if model not in ("bloom", "gemma3n", "gpt2_dropout")),
        lambda model: model not in LIKE_OTHERS,
    ),
)
def test_two_ranks_equal_one_process(model: str) -> None:
    for rank in run_ranks(2, tensor_cases.train, modes(model)):
        for found in rank:
            assert distance(found, reference(model)) <= EXACT


@pytest.mark.parametrize("model", rows(zip(ON_FOUR), lambda model: model in OFTEN_ON_FOUR))
def test_four_ranks_equal_one_process(model: str) -> None:
    for rank in run_ranks(4, tensor_cases.train, modes(model)):
        for found in rank:
            assert distance(found, reference(model)) <= EXACT


@pytest.mark.parametrize(
    "model", rows(zip([*ON_FOUR, "gemma3", "gptj", "opt", "phi3"]), lambda model: model in OFTEN_ADAPTED)
)
def test_adapters_of_several_ranks_equal_those_of_one(model: str) -> None:
    expected = reference(model, adapters=True)
    assert expected.parameters and all(".lora_" in name for name in expected.parameters)
    cases = [replace(case, adapters=True) for case in modes(model)]
    for found in run_ranks(4 if model in ON_FOUR else 2, tensor_cases.train, cases)[-1]:
        assert distance(found, expected) <= EXACT


@pytest.mark.parametrize("model", rows(zip(("qwen3", "gpt2")), lambda model: model == "qwen3"))
def test_recompute_changes_nothing(model: str) -> None:
    cases = [Case(model, sequence_parallel=sequence, recompute=True) for sequence in (False, True)]
    for found in run_ranks(2, tensor_cases.train, cases)[0]:
        assert distance(found, reference(model)) <= EXACT


@pytest.mark.parametrize(
    ("model", "sequence", "adapters"), [("qwen3", False, False), ("gpt2", True, False), ("llama", False, True)]
)
def test_each_planted_bug_shows(model: str, sequence: bool, adapters: bool) -> None:
    """The same ranks run all bugs, one after another."""
    bugs = sorted(tensor_cases.BUGS.keys() - {"none"})
    cases = [Case(model, sequence_parallel=sequence, bug=bug, adapters=adapters) for bug in bugs]
    found = run_ranks(2, tensor_cases.train, cases)[0]
    for bug, trained in zip(bugs, found, strict=True):
        assert distance(trained, reference(model, adapters=adapters)) > 1e-4, bug


@pytest.mark.parametrize(("seeds", "alike"), [((5,), True), ((5, 6), False)])
@pytest.mark.parametrize(
    ("adapters", "name"),
    [(False, "transformer.ln_f.weight"), (True, "transformer.h.0.mlp.c_proj.lora_B.default.weight")],
)
def test_dropout_of_one_seed_keeps_the_ranks_alike(
    adapters: bool, name: str, seeds: tuple[int, ...], alike: bool
) -> None:
    """With different seeds the ranks use different dropout masks, and replicated parameters diverge."""
    first, second = run_ranks(2, tensor_cases.train, [Case("gpt2_dropout", seeds=seeds, adapters=adapters)])
    assert torch.equal(first[0].parameters[name], second[0].parameters[name]) is alike


def test_ranks_of_a_tensor_parallel_group_share_their_random_stream() -> None:
    plan = make_plan(load_config(["parallel=3d", "model=tiny"]), Machine(gpus=0, world_size=8))
    assert [dropout_stream(plan, rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_each_rank_stores_its_part() -> None:
    whole = reference("llama").stored
    norms = 5 * LLAMA["hidden_size"]
    for found in run_ranks(2, tensor_cases.train, [Case("llama")]):
        assert found[0].stored == (whole - norms) // 2 + norms


def test_tied_embeddings_stay_one_parameter() -> None:
    model = "llama_tied_odd_vocabulary"
    assert tied_names(tensor_cases.build(model)) == {"lm_head.weight": "model.embed_tokens.weight"}
    names = [name for rank in run_ranks(2, tensor_cases.ties, model) for name in rank.items()]
    assert names == [("lm_head.weight", "model.embed_tokens.weight")] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [64, 61])
def test_loss_of_divided_logits(words: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for slice_elements in (50, 2**24):
        for rank in run_ranks(2, tensor_cases.losses_of_divided_logits, words, dtype, slice_elements):
            assert max(rank) <= tolerance


def test_collectives_are_those_of_the_chapter() -> None:
    layers = LLAMA["num_hidden_layers"]
    forward, backward = run_ranks(2, tensor_cases.collectives_of_a_step, "llama", False)[0]
    # Forward adds one for the embedding and two for the loss; backward adds one at the input of the head.
    assert forward == {"all_reduce": 2 * layers + 3}
    assert backward == {"all_reduce": 2 * layers + 1}
    forward, backward = run_ranks(2, tensor_cases.collectives_of_a_step, "llama", True)[0]
    assert forward == {"all_reduce": 3, "all_gather": 2 * layers + 1, "reduce_scatter": 2 * layers}
    assert backward == {"all_reduce": 1, "all_gather": 2 * layers + 1, "reduce_scatter": 2 * layers}


def test_layers_compile_whole() -> None:
    (plain, compiled), breaks = run_ranks(2, tensor_cases.compiled_losses, "qwen3")[0]
    assert breaks == 0
    assert abs(compiled / plain - 1) <= EXACT


# name: model, user plan, text that the start-up check must report
WRONG: dict[str, tuple[str, dict[str, str], str]] = {
    "both sides of the MLP by columns": ("llama", {"model.layers.*.mlp.down_proj": "colwise"}, "does not run"),
    "a norm on heads taken for a whole one": ("qwen3", {"model.layers.*.self_attn.q_norm": "replicate"}, "q_norm"),
    "three matrices in one cut as one": ("gpt2", {"transformer.h.*.attn.c_attn": "colwise"}, "the loss is"),
    "statistics over features that are divided": (
        "gemma3n",
        {
            f"model.layers.*.mlp.{part}_proj": "rowwise" if part == "down" else "colwise"
            for part in ("gate", "up", "down")
        },
        "the loss is",
    ),
    "one matrix of a region left whole": ("llama", {"model.layers.*.mlp.up_proj": "replicate"}, "does not run"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_start_up_check_finds_a_wrong_plan(wrong: str) -> None:
    model, plan, expected = WRONG[wrong]
    for message, _ in run_ranks(2, tensor_cases.checked, model, plan, False):
        assert message.startswith(f"parallel.tensor_plan: wrong for {MODELS[model]['model_type']}: ")
        assert expected in message


@pytest.mark.parametrize("model", ["llama_two_kv_heads", "gemma3", "mixtral", "gpt2"])
def test_start_up_check_accepts_a_right_plan(model: str) -> None:
    for sequence in (False, True):
        assert run_ranks(2, tensor_cases.checked, model, {}, sequence) == [("", [])] * 2


def test_start_up_check_keeps_the_layers_of_a_model_that_shares_between_them() -> None:
    assert run_ranks(2, tensor_cases.checked, "gemma3n", {}, False) == [("", [])] * 2


@pytest.mark.parametrize("model", ["llama_two_kv_heads", "gpt2"])
def test_start_up_check_sees_adapters(model: str) -> None:
    assert run_ranks(2, tensor_cases.checked, model, {}, True, tensor_cases.ADAPTERS) == [("", [])] * 2
    message = run_ranks(2, tensor_cases.checked_without_sums, model)[0]
    assert "wrong gradient of" in message and "lora_A" in message


def test_start_up_check_refuses_to_divide_folded_sequences() -> None:
    message, _ = run_ranks(2, tensor_cases.checked, "opt", {}, True)[0]
    assert "have no sequence dimension to divide; set parallel.sequence_parallel=false" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({**LLAMA, "num_attention_heads": 9, "hidden_size": 36, "num_key_value_heads": 3}, "the 9 attention heads"),
        ({**LLAMA, "intermediate_size": 49}, "the MLP's 49 features"),
        ({**LLAMA, "model_type": "stablelm", "num_key_value_heads": 1}, "num_key_value_heads is 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(fields: dict[str, object], expected: str) -> None:
    assert expected in run_ranks(2, tensor_cases.refused, fields)[0]


def test_adapters_of_experts_are_refused() -> None:
    model = tensor_cases.build("mixtral")
    add_adapters(model, replace(tensor_cases.ADAPTERS, target_modules=["q_proj", "gate_up_proj"]))
    with pytest.raises(
        ConfigError, match=r"^tuning\.target_modules: model\.layers\.0\.mlp\.experts\S* would get adapters"
    ):
        tensor_plan(model, 2)
    model = tensor_cases.build("mixtral")
    add_adapters(model, tensor_cases.ADAPTERS)
    assert tensor_plan(model, 2)["model.layers.*.self_attn.q_proj"] == "colwise"


def test_styles_of_adapters() -> None:
    plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "layers.*.latent": "mla_kv_a_proj"}
    layers = ("up", "down", "latent", "router")
    parts = (
        "",
        ".base_layer",
        ".lora_A.default",
        ".lora_A.default.weight",
        ".lora_B.default",
        ".lora_B.default.weight",
    )
    names = [f"layers.0.{layer}{part}" for layer in layers for part in parts]
    assert tensor_adapters.styles_of(plan, [*names, "layers.1.up"]) == {
        "layers.0.up.base_layer": "colwise",
        "layers.0.up.lora_A.default": "adapter_before_columns",
        "layers.0.up.lora_B.default": "colwise",
        "layers.0.down.base_layer": "rowwise",
        "layers.0.down.lora_A.default": "rowwise",
        "layers.0.down.lora_B.default": "adapter_after_rows",
        "layers.0.latent": "mla_kv_a_proj",
        "layers.0.router.lora_A.default": "replicate",
        "layers.0.router.lora_B.default": "replicate",
        "layers.1.up": "colwise",
    }


def test_rules() -> None:
    fields = {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 64, "vocab_size": 601}
    assert list(check_tensor(fields, 1, False, 7)) == []
    assert list(check_tensor(fields, 2, True, 16)) == []
    assert list(check_tensor(fields, 12, False, 7)) == [
        "parallel.tp=12: does not divide the MLP's 64 features; use 1, 2, 4, 8, 16, 32, 64"
    ]
    assert list(check_tensor(fields, 4, True, 18)) == [
        "parallel.tp=4: the 6 key-value heads can be neither divided by it nor copied a whole number of times; use a"
        " divisor or a multiple of 6",
        "data.seq_len=18: parallel.sequence_parallel=true splits it over parallel.tp=4; use a multiple of 4, such as"
        " 16",
    ]
    assert "the 12 attention heads; use 1, 2, 3, 4, 6, 12" in next(check_tensor(fields, 8, False, 16))
    assert "leaves a rank without any of the 5 tokens" in next(check_tensor({"vocab_size": 5}, 4, False, 16))
    assert "parallel.tp is 1; set it to false" in next(check_tensor(fields, 1, True, 16))


def test_shares() -> None:
    assert share_of("colwise", "weight", 2).dim == 0
    assert share_of("colwise", "weight", 2, transposed=True).dim == 1
    assert share_of("colwise", "bias", 1).dim == 0
    assert share_of("rowwise", "weight", 2).dim == 1
    assert share_of("rowwise", "weight", 2, transposed=True).dim == 0
    assert share_of("rowwise", "bias", 1).dim is None
    assert share_of("packed_colwise:3", "weight", 2).parts == 3
    assert (share_of("packed_colwise", "gate_up_proj", 3).dim, share_of("rowwise", "down_proj", 3).dim) == (1, 2)
    assert share_of("vocabulary", "weight", 2).dim == 0
    assert share_of(None, "weight", 2).dim is None


def test_plans_of_ours_are_well_formed() -> None:
    for model_type, plan in PLANS.items():
        assert list(check_plan(plan, model_type)) == []
    assert {split_style(style)[0] for plan in PLANS.values() for style in plan.values()} <= STYLES.keys()


def test_users_plan_goes_over_the_models() -> None:
    model = tensor_cases.build("llama")
    plan = tensor_plan(model, 2, {"model.layers.*.mlp.gate_proj": "replicate", "lm_head": "replicate"})
    names = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens", "lm_head"]
    assert list(match(plan, names).values()) == ["replicate", "colwise", "embedding_rowwise", "replicate"]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (
            {"model.layers.*.mlp.up_proj": "columns"},
            "columns: there is no such style; use one of added_once, all_reduce, channels, colwise, ",
        ),
        ({"model.layers.*.mlp.c_fc": "colwise"}, "LlamaForCausalLM has nothing of this name"),
        ({"model.layers.*.mlp.up_proj": "packed_colwise:x"}, "takes the number of packed matrices"),
        ({"model.layers.*.mlp.up_proj": "colwise:2"}, "only divide takes names"),
    ],
)
def test_users_mistakes_in_a_plan(plan: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor_plan\.model") as caught:
        tensor_plan(tensor_cases.build("llama"), 2, plan)
    assert expected in str(caught.value)


def test_an_architecture_without_a_plan_is_named() -> None:
    with pytest.raises(ConfigError, match=r"plan for bloom, and none can be derived; use parallel.tp=1, or give one: "):
        tensor_plan(tensor_cases.build("bloom"), 5)
