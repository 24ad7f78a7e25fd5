"""Building, filling and exporting models of every shape."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import Config
from tests.support.cases import run_trainer
from tests.support.harness import run_ranks
from tests.support.model_folders import FIELDS, save
from trainer.checkpoint.hub import export_model
from trainer.data.tokenizer import build_byte_tokenizer
from trainer.model.build import _LargeOnMeta, build_hf_config, build_model, decoder_layers, tied_names
from trainer.model.filling import materialize, units
from trainer.model.fitting import persistent_buffers
from trainer.model.weights import open_weights

EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 2},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}
TINY = ["tiny", "tiny_gpt2", "tiny_qwen3"]
CPU = torch.device("cpu")


def build(*overrides: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = load_config(list(overrides))
    model = build_model(config.model, build_hf_config(config.model))
    materialize(model, open_weights(config.model, model, seed=seed)(model), device=CPU, dtype=dtype)
    return model.eval()


def config_of(*overrides: str) -> Config:
    return load_config(list(overrides))


def test_a_large_model_is_built_without_memory() -> None:
    config = config_of("model=llama3_1_70b").model
    model = build_model(config, build_hf_config(config))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert sum(parameter.numel() for parameter in model.parameters()) == 70_553_706_496


@pytest.mark.parametrize("name", TINY)
def test_units_hold_every_parameter_once(name: str) -> None:
    config = config_of(f"model={name}").model
    model = build_model(config, build_hf_config(config))
    named = [f"{unit}.{key}" for unit, module in units(model) for key, _ in module.named_parameters()]
    expected = [key for key, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(named) == sorted(expected)
    assert len(decoder_layers(model)) == 4


@pytest.mark.parametrize("name", TINY)
def test_random_weights_follow_the_models_own_recipe(name: str) -> None:
    model = build(f"model={name}")
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(model.config)
    for (key, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert ours.std().item() == pytest.approx(other.std().item(), rel=0.2, abs=1e-6), key
        assert ours.mean().item() == pytest.approx(other.mean().item(), abs=5e-3), key


def test_random_weights_do_not_depend_on_order_dtype_or_what_else_is_filled() -> None:
    whole = build("model=tiny_gpt2")
    config = config_of("model=tiny_gpt2").model
    other = build_model(config, build_hf_config(config))
    weights = open_weights(config, other, seed=0)(other)
    torch.manual_seed(123)
    for name, unit in reversed(list(units(other))):
        keys = [key for key, p in unit.named_parameters() if p.is_meta and f"{name}.{key}" not in tied_names(other)]
        if name.endswith("h.2") and keys:
            unit.to_empty(device=CPU)
            with torch.no_grad():
                weights.fill(name, unit, keys)
            for key in keys:
                assert torch.equal(unit.get_parameter(key), whole.get_submodule(name).get_parameter(key)), key
            break
    else:
        pytest.fail("no such unit")
    half = build("model=tiny_gpt2", dtype=torch.bfloat16)
    for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16())
    assert not torch.equal(build("model=tiny_gpt2", seed=1).lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("name", ["tiny_gpt2", "tiny_qwen3"])
def test_tied_weights_stay_one_tensor(name: str) -> None:
    model = build(f"model={name}")
    head = model.get_output_embeddings()
    assert head is not None and model.get_input_embeddings().weight is head.weight


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shard_bytes", [10**9, 10**6])
def test_an_exported_folder_loads_with_the_same_loss(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model, tokenizer = build(f"model={name}"), build_byte_tokenizer()
    target = tmp_path / "model"
    export_model(model.named_parameters(), model, tokenizer, target, dtype=torch.float32, shard_bytes=shard_bytes)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(target).eval()
    again = AutoTokenizer.from_pretrained(target)
    ids = torch.tensor([again("def main() -> None:")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss)
    ours = build(f"model.path={target}", "model.weights=pretrained", seed=99)
    for (key, left), right in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right), key


def test_names_without_the_base_prefix_are_found(tmp_path: Path) -> None:
    """GPT-2 on the hub was saved from the bare model: it has `wte.weight` instead of `transformer.wte.weight`."""
    model = build("model=tiny_gpt2")
    base = model.base_model
    assert isinstance(base, PreTrainedModel)
    base.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    ours = build(f"model.path={tmp_path}", "model.weights=pretrained", seed=99)
    name = "transformer.wte.weight"
    assert torch.equal(ours.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_what_transformers_renames_is_read_through_it(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file stores each expert separately, and DeepSeek's routing bias is a buffer."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**FIELDS, **EXPERTS[kind]}))
    for _, buffer in persistent_buffers(model):
        buffer.uniform_()
    save(model, tmp_path / "there")
    with caplog.at_level(logging.INFO):
        ours = build(f"model.path={tmp_path}/there", "model.weights=pretrained", seed=99)
    assert "they are converted one by one" in caplog.text
    export_model(ours.named_parameters(), ours, build_byte_tokenizer(), tmp_path / "again", dtype=torch.float32)
    again = build(f"model.path={tmp_path}/again", "model.weights=pretrained", seed=98)
    for key, value in model.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.config.num_hiden_layers=2"], "model.config.num_hiden_layers=2: LlamaConfig has no such field"),
        (["model.config.model_type=lama"], "model.config.model_type=lama: "),
        (
            ["model.config.num_attention_heads=3"],
            "model.config.num_key_value_heads=2: must divide the 3 attention heads",
        ),
        (["model.config.hidden_size=130"], "model.config="),
        (["model.attention=flash_attention_2"], "model.attention=flash_attention_2"),
    ],
)
def test_a_config_no_model_can_have(overrides: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(*overrides)
    assert str(error.value).startswith(text) or text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_exported_model_names_its_architecture(tmp_path: Path) -> None:
    """This also holds under FSDP2, which changes the class of the model."""
    keys = ["parallel=fsdp", "data=synthetic", "data.seq_len=32", "train.steps=1", "train.eval_samples=0"]
    run_ranks(2, run_trainer, [*keys, f"train.run_dir={tmp_path}/run"])
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]


def test_stacks_of_experts_that_begin_as_zeros_take_no_memory() -> None:
    with _LargeOnMeta():
        stack, table = torch.zeros(16, 2**13, 2**13), torch.zeros(2**6, 2**6)
        drawn = torch.empty(2**10, 2**10).normal_()
    assert stack.is_meta and drawn.is_meta and not table.is_meta
    assert stack.shape == (16, 2**13, 2**13)
