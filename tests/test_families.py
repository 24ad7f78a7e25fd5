"""Each MoE family trains equally under every layout, and loads and exports the parameter names of the hub."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.load import load_config
from tests.support.cases import Trained
from tests.support.families import FAMILIES, fields_of, train_all, words_of
from tests.support.harness import run_ranks
from tests.support.parity import distance
from tests.support.selection import rows
from tests.support.shared import once
from trainer.checkpoint.hub import export_model
from trainer.data.tokenizer import build_byte_tokenizer
from trainer.model.build import build_hf_config, build_model
from trainer.model.filling import materialize
from trainer.model.fitting import persistent_buffers, quiet
from trainer.model.weights import open_weights

OFTEN = ("deepseek_v3", "gpt_oss", "qwen2_moe")
"""Families tested with every change. They cover latent attention, dense first layers and a shared expert (deepseek_v3);
biases, sinks and windows (gpt_oss); and a gated shared expert (qwen2_moe). The other families recombine these parts."""
ADAPTED = ("deepseek_v3", "gpt_oss")
LAYOUTS = {
    "expert": ["parallel=expert"],
    "fsdp": ["parallel=fsdp"],
    "tensor": ["parallel=tensor", "parallel.tp=2"],
    "tensor, sequence parallel": ["parallel=tensor", "parallel.tp=2", "parallel.sequence_parallel=true"],
    "expert, sequence parallel": ["parallel=expert", "parallel.tp=2", "parallel.sequence_parallel=true"],
}
RANKS = {"expert, sequence parallel": 4}
"""Number of ranks, for the layouts that need more than two."""
GROUPS = {"often": OFTEN, "rest": tuple(name for name in FAMILIES if name not in OFTEN)}


def their_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields_of(family)), dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    for _, buffer in persistent_buffers(model):
        buffer.uniform_()
    return model


@once
def alone(group: str) -> dict[str, Trained]:
    found = run_ranks(1, train_all, {name: words_of(name, "single") for name in GROUPS[group]}, timeout=300)[0]
    for trained in found.values():
        assert all(math.isfinite(loss) for loss in trained.losses)
        assert max(trained.grad_norms) > 0.25, "clipping was never active"
    return found


@pytest.mark.parametrize(
    ("layout", "group"),
    rows(
        ((layout, group) for layout in LAYOUTS for group in GROUPS),
        lambda layout, group: group == "often" and layout in ("expert", "tensor", "expert, sequence parallel"),
    ),
)
def test_a_family_equals_one_process(layout: str, group: str) -> None:
    runs = {name: words_of(name, "single", *LAYOUTS[layout]) for name in GROUPS[group]}
    found = run_ranks(RANKS.get(layout, 2), train_all, runs, timeout=300)[0]
    apart = {name: distance(found[name], expected) for name, expected in alone(group).items()}
    assert all(one.largest <= 1e-10 for one in apart.values()), apart


@pytest.mark.nightly
def test_only_float32_parts_differ_between_four_ranks_and_one() -> None:
    """Routers compute their softmax in float32 for every model dtype, so the gradient norm of qwen3_moe under tp=4
    differs by 2e-7 from a single process. This test runs the softmax in float64 too."""
    four = words_of("qwen3_moe", "single", "parallel=tensor", "parallel.tp=4")
    expected = run_ranks(1, train_all, {"one": words_of("qwen3_moe", "single")})[0]["one"]
    assert distance(run_ranks(4, train_all, {"four": four})[0]["four"], expected).largest <= 1e-10


@once
def adapted_alone(stacks: bool) -> dict[str, Trained]:
    return run_ranks(1, train_all, {name: words_of(name, "single", *adapters(stacks)) for name in ADAPTED})[0]


def adapters(stacks: bool) -> list[str]:
    """Returns the LoRA overrides. Stacked experts only get adapters when they are named as target modules; the default
    targets can be sharded by tensor parallel."""
    named = "tuning.target_modules=[experts.gate_up_proj,experts.down_proj,o_proj]"
    return ["tuning=lora", "tuning.rank=2", *([named] if stacks else [])]


@pytest.mark.parametrize(
    ("layout", "stacks"),
    rows([("tensor", False), ("fsdp", True), ("expert", True)], lambda layout, _: layout == "expert"),
)
def test_adapters_of_a_family_equal_one_process(layout: str, stacks: bool) -> None:
    runs = {name: words_of(name, "single", *LAYOUTS[layout], *adapters(stacks)) for name in ADAPTED}
    found = run_ranks(2, train_all, runs)[0]
    apart = {name: distance(found[name], one) for name, one in adapted_alone(stacks).items()}
    assert all(one.largest <= 1e-8 for one in apart.values()), apart
    trained = adapted_alone(stacks)["gpt_oss"].parameters
    assert any("experts." in name and value.any() for name, value in trained.items() if "lora_B" in name) is stacks


def test_a_folder_with_the_hubs_names_begins_every_layout_alike(tmp_path: Path) -> None:
    """The folder stores each expert separately, while the model holds them stacked."""
    with quiet():
        their_model("mixtral").save_pretrained(tmp_path / "there")
    path = f"model.path={tmp_path}/there"
    expected = run_ranks(1, train_all, {"one": words_of("mixtral", "single", path)})[0]["one"]
    runs = {
        layout: words_of("mixtral", "single", *words, path) for layout, words in LAYOUTS.items() if layout not in RANKS
    }
    for layout, found in run_ranks(2, train_all, runs)[0].items():
        assert distance(found, expected).largest <= 1e-10, layout


@pytest.mark.parametrize("family", rows(zip(FAMILIES), lambda family: family in (*OFTEN, "mixtral")))
def test_what_is_read_of_a_folder_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    theirs = their_model(family)
    with quiet():
        theirs.save_pretrained(tmp_path)
    choice = load_config([f"model.path={tmp_path}", "model.weights=pretrained"]).model
    model = build_model(choice, build_hf_config(choice))
    materialize(model, open_weights(choice, model, seed=0)(model), device=torch.device("cpu"), dtype=torch.float32)
    read = model.state_dict()
    assert read.keys() == theirs.state_dict().keys()
    assert [name for name, value in theirs.state_dict().items() if not torch.equal(value, read[name])] == []


@pytest.mark.parametrize("family", rows(zip(FAMILIES), lambda family: family in (*OFTEN, "mixtral")))
def test_an_exported_folder_has_the_names_that_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    model = their_model(family)
    with quiet():
        model.save_pretrained(tmp_path / "theirs")
    export_model(model.named_parameters(), model, build_byte_tokenizer(), tmp_path / "ours", dtype=torch.float32)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
