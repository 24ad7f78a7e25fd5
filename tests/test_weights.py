"""A model's initial values come from its folder or its class, and are the same under every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from configs.load import load_config
from tests.support.cases import run_trainer, train
from tests.support.harness import run_ranks
from tests.support.model_folders import (
    FIELDS,
    WORDS,
    float8,
    rewrite,
    run_all,
    save,
    save_llama,
    tensors_of,
    unpacked,
)
from tests.test_data_tokenizer import save_bpe
from trainer.checkpoint.__main__ import main as checkpoint_main
from trainer.model.build import build_hf_config, build_model
from trainer.model.constructed import Constructors
from trainer.model.filling import materialize, units
from trainer.model.weights import RandomWeights, open_weights

NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
TOKENS = 267
NOTHING_LEARNED = ["optimizer=sgd", "optimizer.lr=1e-30", "optimizer.weight_decay=0", "train.global_batch_size=4"]


@pytest.fixture(scope="module")
def pieced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a folder and its expected values: float8 projections, no final norm, and too few vocabulary entries."""
    folder = tmp_path_factory.mktemp("pieced")
    save_llama(folder)
    stored = tensors_of(folder)
    stored.pop(NORM)
    expected = {NORM: torch.ones(32)}
    for name, tensor in list(stored.items()):
        expected[name] = tensor
        if "proj" in name:
            stored[name], stored[f"{name}_scale_inv"] = float8(tensor, 16)
            expected[name] = unpacked(stored[name], stored[f"{name}_scale_inv"])
        elif name in (EMBEDDING, HEAD):
            expected[name] = torch.cat([tensor, tensor.mean(0, keepdim=True).expand(TOKENS - 260, -1)])
    rewrite(folder, stored)
    return folder, expected


@pytest.mark.parametrize("layout", ["single", "fsdp", "pipeline", "tensor", "zero3"])
def test_scales_new_rows_and_missing_tensors_under_every_layout(
    layout: str, pieced: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder, expected = pieced
    words = [f"model.path={folder}", "model.resize_vocabulary=true", "model.missing_weights=random"]
    size = [f"model.config.vocab_size={TOKENS}", f"parallel={layout}", "train.gradient_accumulation_steps=2"]
    world_size = 1 if layout == "single" else 2
    found = run_ranks(world_size, train, [*WORDS, *words, *size, *NOTHING_LEARNED, "train.micro_batch_size=null"])[0]
    assert found.parameters.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_float8_is_multiplied_exactly(pieced: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, expected = pieced
    config = load_config([f"model.path={folder}", "model.weights=pretrained", "model.missing_weights=random"])
    assert config.model.path is not None
    model = build_model(config.model, build_hf_config(config.model))
    materialize(
        model, open_weights(config.model, model, seed=0)(model), device=torch.device("cpu"), dtype=torch.float32
    )
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(model.get_parameter(name), expected[name])


def fill_and_let_go(folder: Path) -> tuple[int, int]:
    """Return the bytes of a model whose experts are stored one by one, and the peak of additional bytes while it loads.

    Each unit is filled and then released, as a sharding engine does.
    """
    choice = load_config([f"model.path={folder}", "model.weights=pretrained"]).model
    model = build_model(choice, build_hf_config(choice))
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def let_go(unit: torch.nn.Module) -> None:
        found.append(anonymous())
        for parameter in unit.parameters():
            parameter.data = torch.empty(0)

    found = [anonymous()]
    source = open_weights(choice, model, seed=0)(model)
    materialize(model, source, device=torch.device("cpu"), dtype=torch.float32, after_unit=let_go)
    return whole, max(found) - found[0]


def anonymous() -> int:
    """Return the bytes of anonymous memory; the system can reclaim pages mapped from files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_a_process_holds_a_part_of_a_folder_at_a_time(tmp_path: Path) -> None:
    fields = {**FIELDS, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_local_experts": 8}
    save(AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields)), tmp_path)
    whole, held = run_ranks(1, fill_and_let_go, tmp_path)[0]
    assert whole > 100 * 2**20
    assert held < whole / 2


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    """The message names the key, and with the key the run's model has a row for each token."""
    save_llama(tmp_path / "model", vocab_size=280, tie_word_embeddings=True)
    save_bpe(tmp_path / "model", vocabulary=290, eos_token="</s>")
    tokens = len(json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"])
    (tmp_path / "text.txt").write_text("def main() -> None:\n" * 400)
    data = [
        "data=files",
        f"data.paths=[{tmp_path}/text.txt]",
        f"data.cache_dir={tmp_path}/cache",
        "data.tokenizer=null",
        "train.eval_samples=0",
    ]
    words = [*data, f"model.path={tmp_path}/model", f"train.run_dir={tmp_path}/run"]
    (refused, said), (code, more) = run_ranks(1, run_all, [words, [*words, "model.resize_vocabulary=true"]])[0]
    assert refused == 2
    assert said.splitlines() == [
        f"model.path={tmp_path}/model: has {tokens} token ids, but the model's vocabulary has 280; set"
        " model.resize_vocabulary=true, or choose a smaller tokenizer (data.tokenizer=bytes has 257)"
    ]
    assert code == 0, more
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert exported.config.vocab_size == exported.get_parameter(EMBEDDING).shape[0] == tokens


SMALL = {
    "apertus": FIELDS,
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 260},
    "data2vec-text": {name: FIELDS[name] for name in FIELDS if name != "num_key_value_heads"} | {"is_decoder": True},
}


def without_memory(kind: str) -> PreTrainedModel:
    overrides = [f"model.config.{key}={str(value).lower()}" for key, value in SMALL[kind].items()]
    config = load_config(["model=tiny", f"model.config.model_type={kind}", *overrides])
    config.model.architecture = {}
    return build_model(config.model, build_hf_config(config.model))


def drawn(kind: str, *, backwards: bool = False) -> dict[str, torch.Tensor]:
    """Return all parameters under `model.weights=random`. backwards: fill the units in reverse order."""
    model = without_memory(kind)
    weights = RandomWeights(model, seed=3)
    if backwards:
        for name, unit in reversed(list(units(model))):
            keys = [key for key, parameter in unit.named_parameters() if parameter.is_meta]
            unit.to_empty(device="cpu")
            with torch.no_grad():
                weights.fill(name, unit, keys)
    else:
        materialize(model, weights, device=torch.device("cpu"), dtype=torch.float32)
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_values_of_constructors_are_in_random_weights(kind: str) -> None:
    """Memory is filled with NaN, so a value that neither initialisation nor the constructor writes is visible."""
    torch.manual_seed(0)
    theirs = dict(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL[kind])).named_parameters())
    ours = drawn(kind)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.isfinite(value).all(), name
        assert value.std(correction=0).item() == pytest.approx(theirs[name].std(correction=0).item(), rel=0.3), name
        if theirs[name].std(correction=0) == 0:
            assert torch.equal(value, theirs[name].float()), name


def test_values_of_constructors_do_not_depend_on_order() -> None:
    one, other = drawn("openai-gpt"), drawn("openai-gpt", backwards=True)
    assert all(torch.equal(value, other[name]) for name, value in one.items() if name in other)
    same = [one[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in (0, 1)]
    assert not torch.equal(*same)


def test_a_value_that_nobody_gives_is_named() -> None:
    model = without_memory("openai-gpt")
    constructors = Constructors(model)
    with pytest.raises(Exception, match=r"gives transformer\.h\.0\.ln_1\.weight no value"):
        parameter = torch.full((32,), math.nan)
        constructors.calls["transformer.h.0.ln_1"] = (Hollow, (), {})
        constructors.fill("transformer.h.0.ln_1", "weight", parameter, hash)


class Hollow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(32))


def test_the_models_generation_config_is_exported_as_it_was(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text('{"eos_token_id": [7, 9],\n "temperature": 0.6, "do_sample": true}')
    words = [*WORDS, f"model.path={tmp_path}/model", f"train.run_dir={tmp_path}/run"]
    assert run_ranks(1, run_trainer, words) == [0]
    assert checkpoint_main(["export", f"{tmp_path}/run", f"{tmp_path}/exported"]) == 0
    for exported in (tmp_path / "run" / "model", tmp_path / "exported"):
        assert (exported / generation.name).read_bytes() == generation.read_bytes()
