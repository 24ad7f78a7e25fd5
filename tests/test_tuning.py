"""`tuning=lora`: adapters are the same under every layout, the model is unchanged, and peft reads the files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from configs.errors import ConfigError, PlanError
from configs.load import load_config
from tests.support.cases import run_trainer, train
from tests.support.harness import run_ranks
from tests.support.parity import MODELS, Trained, measure, reference, words
from tests.support.selection import rows
from trainer.axes.pipeline.split import split_model
from trainer.checkpoint.export import export
from trainer.linear import convert, report
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model
from trainer.plan.machine import Machine

STEPS = 5
LORA = ("tuning=lora", "tuning.rank=4", "optimizer.lr=0.03", "train.gradient_accumulation_steps=2")
# At 0.03, rounding to 32 bits or fewer makes the layouts diverge.
SLOWER = tuple(word if "lr" not in word else "optimizer.lr=0.003" for word in LORA)
DESCENT = (*(word for word in LORA if "lr" not in word), "optimizer=sgd", "optimizer.lr=0.3")
ZERO = ("zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload")
LAYOUTS = {
    **{"ddp": 2, "fsdp": 2, "hsdp": 4, "fsdp_offload": 2, "pipeline": 2, "pipeline_fsdp": 4, "context": 2},
    **{"tensor": 2, "tensor parallel.sequence_parallel=true": 2, "tensor_fsdp": 4, "tensor_data": 4},
    **{"pipeline_data": 4, "3d": 8, "3d_zero1": 8},
}
# Tied embeddings, learned positions and Conv1D matter in layouts that shard or split them.
TIED = ("fsdp", "pipeline", "tensor", "tensor_fsdp")
OFTEN_TIED = ("pipeline",)
# Nightly: combinations of axes that other rows cover, and layouts that the tied model covers.
REPEATED = ("hsdp", "tensor_data", "pipeline_data", "pipeline_fsdp", "3d", "3d_zero1", "fsdp_offload", "pipeline")
REPEATED += ("tensor_fsdp", "tensor", "ddp")
# While B is small, Adam divides small gradients by small moments, so rounding grows more than in full training.
FLOAT64, FLOAT32 = 1e-8, 1e-4


@pytest.mark.parametrize(
    ("layout", "model"),
    rows(
        [*((layout, "llama") for layout in LAYOUTS), *((layout, "gpt2") for layout in TIED)],
        lambda layout, model: layout not in REPEATED and (model == "llama" or layout in OFTEN_TIED),
    ),
)
def test_layout_trains_the_adapters_of_one_process(layout: str, model: str) -> None:
    found = measure(layout.split(), LAYOUTS[layout], model=model, precision="fp64", steps=STEPS, extra=LORA)
    assert found.largest <= FLOAT64
    assert all(".lora_" in name for name in reference(model, "fp64", STEPS, *LORA).parameters)


STACKED = "tuning.target_modules=[experts.gate_up_proj,experts.down_proj,q_proj]"


@pytest.mark.parametrize(
    ("layout", "keys"),
    rows(
        [
            ("expert parallel.tp=2", ()),
            ("expert parallel.tp=2 parallel.sequence_parallel=true", (STACKED,)),
            ("expert_fsdp parallel.dp_shard=1 parallel.tp=4", (STACKED,)),
            ("expert_fsdp train.activation_checkpointing=full", (STACKED,)),
            ("expert_fsdp parallel.pp=2", (STACKED,)),
            ("expert_fsdp parallel.cp=2", (STACKED,)),
        ],
        lambda layout, _: layout.endswith(("full", "sequence_parallel=true")),
    ),
)
def test_divided_experts_have_the_adapters_of_one_process(layout: str, keys: tuple[str, ...]) -> None:
    found = measure(layout.split(), 4, model="mixtral", precision="fp64", steps=STEPS, extra=(*LORA, *keys))
    assert found.largest <= FLOAT64, found
    trained = reference("mixtral", "fp64", STEPS, *LORA, *keys).parameters
    assert any(".experts." in name for name in trained) is bool(keys)


# Options that change an adapter's arithmetic, its initial values, or the parameters trained with it.
VARIANTS = {
    "pissa": ("tuning.init=pissa", "tuning.rslora=true", "tuning.modules_to_save=[lm_head,norm]"),
    "dora": ("tuning.dora=true", "tuning.init=olora"),
    "layers": ("tuning.layers=[1,2]", "tuning.init=gaussian", 'tuning.target_modules=[".*[qv]_proj",down_proj]'),
}
VARIED = {(layout, variant) for layout in ("ddp", "fsdp", "tensor", "pipeline", "zero2") for variant in VARIANTS}
VARIED -= {("tensor", "dora")}
SHOWN = {("tensor", "pissa"), ("fsdp", "dora"), ("pipeline", "layers")}


@pytest.mark.parametrize(
    ("layout", "variant"), rows(sorted(VARIED), lambda layout, variant: (layout, variant) in SHOWN)
)
def test_layout_trains_the_variant_of_one_process(layout: str, variant: str) -> None:
    precision, keys = ("fp32", SLOWER) if layout in ZERO else ("fp64", LORA)
    extra = (*keys, *VARIANTS[variant])
    found = measure([layout], 2, model="llama", precision=precision, steps=STEPS, extra=extra)
    assert found.largest <= (FLOAT32 if layout in ZERO else FLOAT64)


def test_a_stage_without_anything_to_train_is_one_line() -> None:
    model = adapted("tuning.layers=[0]")
    with pytest.raises(PlanError) as refused:
        split_model(model, schedule="1f1b", pp=2, rank=0)
    assert refused.value.problems[0].startswith("parallel.pp=2: stage 1 has layers 2 to 3, of which nothing is trained")


@pytest.mark.parametrize("layout", rows(zip(ZERO), lambda layout: layout == "zero3"))
def test_zero_trains_the_adapters_of_one_process(layout: str) -> None:
    found = measure([layout], 2, model="llama", precision="fp32", steps=STEPS, extra=SLOWER)
    assert found.largest <= FLOAT32, found


@pytest.mark.parametrize(
    "layout",
    [pytest.param("zero1_tensor", marks=pytest.mark.nightly), "zero2_tensor parallel.sequence_parallel=true"],
)
def test_zero_trains_divided_adapters_of_one_process(layout: str) -> None:
    """SGD is used: four sums in another order differ by rounding, which Adam amplifies to 1e-4."""
    found = measure(layout.split(), 4, model="llama", precision="fp32", steps=STEPS, extra=DESCENT)
    assert found.largest <= FLOAT32 / 10, found


def test_adapters_begin_as_the_model_itself() -> None:
    """Before the first update B is zero, so the loss is that of the model without adapters."""
    adapted = reference("llama", "fp64", STEPS, *LORA)
    full = run_ranks(1, train, words("llama", "single", "fp64", 2, "train.gradient_accumulation_steps=2"))[0]
    assert adapted.losses[0] == pytest.approx(full.losses[0], rel=1e-12)


def test_16_bit_trains_float32_adapters_beside_a_16_bit_model() -> None:
    expected = reference("llama", "fp32", STEPS, *SLOWER)
    for layout in ("tensor", "zero3"):
        found: Trained = run_ranks(2, train, words("llama", layout, "bf16", STEPS, *SLOWER))[0]
        assert {value.dtype for value in found.parameters.values()} == {torch.float32}
        assert max(abs(a - b) for a, b in zip(found.losses, expected.losses, strict=True)) <= 3e-2


# peft 0.21 asks transformers under the old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_run_resumes_and_its_adapter_is_peft_s(tmp_path: Path) -> None:
    """Train a base, then adapters in two runs, and compare peft's reading of the files with the trainer's own."""
    common = [
        *MODELS["llama"],
        "data.seq_len=32",
        "train.global_batch_size=8",
        "train.eval_samples=4",
        "logging.progress=lines",
        "precision=fp64",
    ]
    base = tmp_path / "base"
    assert run_ranks(1, run_trainer, [*common, "train.steps=2", f"train.run_dir={base}"]) == [0]
    lora = [
        *common,
        *LORA,
        f"model.path={base}/model",
        "model.weights=pretrained",
        "data.tokenizer=bytes",
        "checkpoint.every=2",
        "scheduler=constant",
    ]
    lora = [word for word in lora if not word.startswith("model=")]
    whole, half, rest = tmp_path / "whole", tmp_path / "half", tmp_path / "rest"
    assert run_ranks(1, run_trainer, [*lora, "train.steps=4", f"train.run_dir={whole}"]) == [0]
    assert run_ranks(2, run_trainer, [*lora, "train.steps=2", f"train.run_dir={half}", "parallel=fsdp"]) == [0, 0]
    resume = [f"train.run_dir={rest}", f"train.resume={half}"]
    assert run_ranks(1, run_trainer, [*lora, "train.steps=4", *resume]) == [0]
    tensors, again = (load_file(run / "model" / "adapter_model.safetensors") for run in (whole, rest))
    assert tensors.keys() == again.keys()
    assert max((tensors[name] - again[name]).abs().max().item() for name in tensors) < 1e-8
    out = tmp_path / "out"
    export(whole, out, dtype=torch.float32)
    assert all(
        torch.equal(value, tensors[name]) for name, value in load_file(out / "adapter_model.safetensors").items()
    )
    described = json.loads((whole / "model" / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["r"]) == (f"{base}/model", 4)
    assert len(AutoTokenizer.from_pretrained(whole / "model")) == 257
    _check_loss_with_peft(base / "model", whole)


def _check_loss_with_peft(base: Path, run: Path) -> None:
    """The adapter that peft loads changes the model's output, and peft loads all of its tensors."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(0, 250, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(plain, str(run / "model"))
        assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-4
    tensors = load_file(run / "model" / "adapter_model.safetensors")
    loaded = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(tensors)
    assert all(
        torch.equal(loaded[name.replace(".weight", ".default.weight")], value) for name, value in tensors.items()
    )


# Routed experts as transformers stores them, and linear layers that peft mistakes for those of transformers 4.
SPARSE = {
    "mixtral": ["model.config.num_local_experts=4", "tuning.target_modules=[q_proj,gate_up_proj,down_proj]"],
    "deepseek_v3": ["model.config.n_routed_experts=4", "model.config.num_experts_per_tok=2", "model.config.n_group=1"],
}
SPARSE["deepseek_v3"] += [
    "model.config.topk_group=1",
    "model.config.num_key_value_heads=4",
    "model.config.first_k_dense_replace=1",
]


# peft 0.21 asks transformers under the old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", rows(zip(SPARSE), lambda kind: kind == "mixtral"))
def test_adapters_of_experts_are_peft_s(kind: str, tmp_path: Path) -> None:
    """All experts are one parameter, for which peft has a separate kind of adapter."""
    sparse = [f"model.config.model_type={kind}", *SPARSE[kind], "data.seq_len=32", "model.config.num_hidden_layers=2"]
    words = ["model=tiny", "tuning=lora", *sparse, "train.steps=2", f"train.run_dir={tmp_path / 'run'}"]
    assert run_ranks(1, run_trainer, [*words, "train.global_batch_size=2", "logging.progress=lines"]) == [0]
    export(tmp_path / "run", tmp_path / "again", dtype=torch.float32)
    for folder in (tmp_path / "run" / "model", tmp_path / "again"):
        config = load_config(words)
        plain = AutoModelForCausalLM.from_config(build_hf_config(config.model))
        loaded = dict(PeftModel.from_pretrained(plain, str(folder)).named_parameters())
        tensors = load_file(folder / "adapter_model.safetensors")
        assert any("experts" in name for name in tensors)
        assert len(tensors) == sum(".lora_" in name for name in loaded)
        assert all(
            torch.equal(loaded[name.replace(".weight", ".default.weight")], value) for name, value in tensors.items()
        )


FAMILIES = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
FAMILIES |= {"gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts"}


def adapted(*words: str) -> PreTrainedModel:
    config = load_config(["model=tiny", "tuning=lora", "tuning.rank=4", *words])
    model = build_model(config.model, build_hf_config(config.model))
    convert(model, config)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_empty_targets_mean_the_same_in_every_family(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every linear layer of the decoder layers gets an adapter of the requested rank. Routers, gates and stacked
    experts get none. The log names both groups."""
    model = adapted(
        f"model.config.model_type={kind}",
        f"model.config.{FAMILIES[kind]}=4",
        "model.config.num_experts_per_tok=2",
    )
    layers = dict(model.model.layers.named_modules())
    linears = {name for name, module in layers.items() if isinstance(module, nn.Linear) and "lora_" not in name}
    have = {name.removesuffix(".base_layer") for name in linears if name.endswith(".base_layer")}
    assert {name for name in linears - have if not name.endswith(".base_layer")} <= {
        f"{layer}.mlp.shared_expert_gate" for layer in range(len(model.model.layers))
    }
    assert {p.shape[0] for name, p in model.named_parameters() if ".lora_A." in name} == {4}
    assert not any("experts.lora" in name or "gate.lora" in name for name, _ in model.named_parameters())
    with caplog.at_level(logging.INFO, logger="trainer"):
        report(model, load_config(["tuning=lora"]))
    trained, frozen, _ = (record.message for record in caplog.records if record.message.startswith("adapters: "))
    assert trained.startswith("adapters: rank 4 for self_attn.q")
    assert frozen.startswith("adapters: frozen without one are model.embed_tokens, ")
    assert "mlp.experts.gate_up_proj" in frozen


def test_named_experts_get_adapters_beside_linear_layers() -> None:
    model = adapted("model.config.model_type=mixtral", "tuning.target_modules=[q_proj,experts.down_proj]")
    names = {
        name.partition(".lora_")[0].partition("layers.")[2][2:]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == {"self_attn.q_proj", "mlp.experts"}


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", "[]"])
def test_target_modules_get_adapters(targets: str) -> None:
    model = adapted(f"tuning.target_modules={targets}")
    found = {name.partition(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert found == (
        {"q_proj", "v_proj"}
        if targets != "[]"
        else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    )
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("nothing_proj", "nothing_proj matches nothing of LlamaForCausalLM; it has linear layers self_attn.q_proj, "),
        ("embed_tokens", "embed_tokens is no linear layer of the decoder of LlamaForCausalLM; it has linear layers "),
        ("q_proj,nosuch,lm_head", "nosuch matches nothing of "),
    ],
)
def test_each_entry_must_match(targets: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        adapted(f"tuning.target_modules=[{targets}]")
    listed = f"tuning.target_modules={targets.split(',')}: "
    assert refused.value.problems[0].startswith(listed + says)
    assert len(refused.value.problems) == sum(name != "q_proj" for name in targets.split(","))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.compile=true", r"^train.compile=true: compiles no layers with adapters"),
        ("tuning.dora=true parallel=tensor", r"^tuning.dora=true: needs whole rows of each matrix, and parallel.tp=2"),
        ("tuning.dora=true parallel=zero3", r"^tuning.dora=true: reads the frozen matrix where ZeRO 3 has not gathe"),
        ("tuning.dora=true tuning=qlora", r"^tuning.dora=true: reads the frozen matrix, which tuning=qlora keeps pac"),
        ('tuning.target_modules=["(q"]', r"^tuning.target_modules=\['\(q'\]: \(q is no regular expression"),
        ("tuning=full tuning.rslora=true", r"^tuning.rslora=true: is for lora, qlora, this is tuning=full"),
    ],
)
def test_what_adapters_cannot_is_refused(override: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(load_config(["tuning=lora", *override.split()]), Machine(gpus=2))
