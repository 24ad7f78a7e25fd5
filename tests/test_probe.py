"""The trainable part of a model is known before step 1: models that see later tokens are refused, parameters without a
gradient are frozen in every layout, and composite models train on text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import ConfigError
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.cases import run_trainer, train
from tests.support.harness import run_ranks
from tests.support.selection import rows
from tests.zoo.tiny import tiny
from trainer.passes import prepare_model

COMMON = ["data=synthetic", "data.seq_len=32", "train.micro_batch_size=2", "train.eval_samples=2"]
RUN = [*COMMON, "logging.progress=lines", "scheduler=constant", "checkpoint.every=1"]
SMALL: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 261,
}
CPMANT: dict[str, object] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dim_head": 16,
    "dim_ff": 64,
}
AFMOE = ["model=tiny", "model.config.model_type=afmoe", "model.config.num_experts=4"]
AFMOE += ["model.config.num_experts_per_tok=2", "model.config.num_hidden_layers=3"]
VISION = "hidden_size:32,intermediate_size:64,num_hidden_layers:6,num_attention_heads:4,image_size:28,patch_size:14"
GEMMA3 = ["model=tiny", "model.config.model_type=gemma3", "model.config.vision_config={" + VISION + "}"]


def folder(path: Path, kind: str, fields: dict[str, object]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": kind, **fields}))
    return path


@pytest.mark.parametrize(("kind", "fields"), [("bert", SMALL), ("cpmant", CPMANT)])
def test_a_model_that_sees_later_tokens_is_refused(
    kind: str, fields: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder(tmp_path / kind, kind, fields)
    words = [f"model.path={model}", "data.tokenizer=bytes", *COMMON, f"data.cache_dir={tmp_path}"]
    assert memory_estimate([*words, "parallel=ddp", "cluster=8xh100"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"model.path={model}: a {type_name(kind)} as it is configured sees later tokens")
    assert line.endswith("set model.config.is_decoder=true" if kind == "bert" else "choose a causal model")
    run = [*words, "train.steps=1", f"train.run_dir={tmp_path / 'run'}"]
    assert run_ranks(1, run_trainer, run) == [2]


def type_name(kind: str) -> str:
    return {"bert": "BertLMHeadModel", "cpmant": "CpmAntForCausalLM"}[kind]


def test_the_remedy_for_bert_trains_and_saves(tmp_path: Path) -> None:
    model = folder(tmp_path / "bert", "bert", SMALL)
    words = [f"model.path={model}", "data.tokenizer=bytes", *RUN, "model.config.is_decoder=true", "train.steps=1"]
    assert run_ranks(1, run_trainer, [*words, f"train.run_dir={tmp_path / 'run'}"]) == [0]


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("deepseek_v4", 32), ("deepseek_v4", 256), ("mllama", 32), ("dots3_note", 32), ("reformer", 32)],
)
def test_what_gets_no_gradient_in_a_run_is_what_is_frozen(kind: str, tokens: int, tmp_path: Path) -> None:
    """The models have layer kinds that the narrow copy lacks, and sequences longer than the probe's."""
    tiny(kind).save_pretrained(tmp_path)
    config = load_config([f"model.path={tmp_path}", "data.tokenizer=bytes", f"data.seq_len={tokens}"])
    frozen = {name for name, parameter in prepare_model(config).named_parameters() if not parameter.requires_grad}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    model.train()(input_ids=torch.arange(tokens)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    assert frozen == {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert (kind == "mllama") is any("cross_attn" in name for name in frozen)


def test_parameters_without_gradient_are_frozen_in_every_layout(tmp_path: Path) -> None:
    """Two steps run under DDP, which waits for gradients, then one each under ZeRO and FSDP; the export is complete."""
    first, then = tmp_path / "first", tmp_path / "fsdp"
    assert run_ranks(2, run_trainer, [*AFMOE, *RUN, "parallel=ddp", "train.steps=2", f"train.run_dir={first}"]) == [
        0,
        0,
    ]
    earlier = first
    for steps, layout in enumerate(("zero3", "fsdp"), start=3):
        own = [f"parallel={layout}", f"train.steps={steps}", f"train.run_dir={tmp_path / layout}"]
        assert run_ranks(2, run_trainer, [*AFMOE, *RUN, *own, f"train.resume={earlier}"]) == [0, 0]
        earlier = tmp_path / layout
    model = prepare_model(load_config(AFMOE))
    before, after = (load_file(run / "model" / "model.safetensors") for run in (first, then))
    # The hub names each expert separately, and so does the export.
    assert before.keys() == after.keys()
    assert sum(value.numel() for value in before.values()) == sum(
        value.numel() for value in model.state_dict().values()
    )
    frozen = [name for name in before if name.endswith("expert_bias")]
    assert frozen
    assert all((before[name] == after[name]).all() for name in frozen)


def test_adapters_pass_over_what_gets_no_gradient() -> None:
    model = prepare_model(load_config(["model.config.model_type=deepseek_v32", "tuning=lora", *small_deepseek()]))
    adapted = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any("kv_b_proj" in name for name in adapted)
    assert not any("indexer" in name for name in adapted)


def small_deepseek() -> list[str]:
    fields = AutoConfig.for_model("deepseek_v32").to_dict()
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 300,
    }
    sizes |= {"n_group": 1, "topk_group": 1, "intermediate_size": 64, "moe_intermediate_size": 64}
    return [f"model.config.{name}={value}" for name, value in sizes.items() if name in fields]


def test_a_composite_model_trains_on_text_alone(tmp_path: Path) -> None:
    """Its vision tower has more layers than the language model; it gets no gradient and stays unchanged."""
    words = [*GEMMA3, *COMMON, "train.steps=2"]
    ddp, fsdp = (run_ranks(2, train, [*words, f"parallel={layout}"])[0] for layout in ("ddp", "fsdp"))
    assert ddp.losses == pytest.approx(fsdp.losses, rel=1e-5)
    assert ddp.grad_norms == pytest.approx(fsdp.grad_norms, rel=1e-4)
    assert any("vision_tower" in name for name in ddp.parameters)
    assert memory_estimate([*words, "parallel=fsdp", "cluster=8xh100", f"data.cache_dir={tmp_path}"]) == 0


def test_a_composite_model_is_not_cut(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        *GEMMA3,
        *COMMON,
        "parallel=tensor",
        "cluster=8xh100",
        "cluster.gpus_per_node=2",
        f"data.cache_dir={tmp_path}",
    ]
    assert memory_estimate(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("parallel.tp=2: cuts language models; a Gemma3ForConditionalGeneration has parts for images")


@pytest.mark.parametrize("kind", rows(zip(("gemma3", "got_ocr2")), lambda kind: kind == "gemma3"))
def test_the_text_of_a_composite_model_alone_is_cut_as_any_language_model(kind: str, tmp_path: Path) -> None:
    """The text model is loaded from the folder of the whole model; the other parts are skipped."""
    AutoModelForCausalLM.from_config(tiny(kind), dtype=torch.float32).save_pretrained(tmp_path)
    path = [f"model.path={tmp_path}", "model.weights=pretrained", "data.tokenizer=bytes"]
    words = [*path, *COMMON, "train.steps=2", "train.global_batch_size=4"]
    whole = run_ranks(1, train, [*words, "parallel=single"])[0]
    text = run_ranks(1, train, [*words, "parallel=single", "model.text_only=true"])[0]
    cut = run_ranks(2, train, [*words, "parallel=tensor", "model.text_only=true"])[0]
    assert text.losses == pytest.approx(whole.losses, rel=1e-5)
    assert cut.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len(text.parameters) < len(whole.parameters)


def test_a_language_model_is_text_only_already() -> None:
    with pytest.raises(ConfigError, match=r"model\.text_only=true: a llama is a language model already; leave it out"):
        prepare_model(load_config(["model=tiny", "model.text_only=true"]))
