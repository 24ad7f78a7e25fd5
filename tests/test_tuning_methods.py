"""`tuning=ia3|adapter|prompt|p_tuning|prefix`: every layout agrees with one process, and the exported folder computes
the same outputs when loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig

from configs.errors import ConfigError, DataError, PlanError
from configs.load import load_config
from tests.support.cases import Trained, run_trainer, train
from tests.support.harness import run_ranks
from tests.support.mutations import train_with
from tests.support.parity import ROWS, Row, distance, words
from tests.support.selection import rows
from tests.support.shared import once
from tests.support.tuning_cases import IDS, train_and_export
from trainer.checkpoint.export import export
from trainer.checkpoint.merge import merge
from trainer.linear.bottleneck_layers import load_bottlenecks
from trainer.make_plan import make_plan
from trainer.passes import prepare_model
from trainer.plan.machine import Machine

OF_PEFT = ("ia3", "prompt", "p_tuning", "prefix")
METHODS = (*OF_PEFT, "adapter")
COUNT = 6
STEPS = 3
# Gradients of a random model are small, so only a small bound clips them.
COMMON = ("train.gradient_accumulation_steps=2", "train.clip_grad_norm=0.002", "optimizer=sgd", "optimizer.lr=10")
ALL = {"ddp": 2, "fsdp": 2, "hsdp": 4, "zero1": 2, "zero2": 2, "zero3": 2}
LAYOUTS = {(method, layout): count for method in METHODS for layout, count in ALL.items()}
LAYOUTS |= {(method, layout): 2 for method in ("ia3", "adapter") for layout in ("pipeline", "context")}
LAYOUTS |= {("adapter", "fsdp train.activation_checkpointing=full"): 2}
LAYOUTS |= {(method, "tensor"): 2 for method in ("prompt", "p_tuning")}
LAYOUTS |= {("prefix", "fsdp train.chunked_loss=true"): 2, ("ia3", "pipeline train.chunked_loss=true"): 2}
LAYOUTS |= {("p_tuning", "tensor parallel.sequence_parallel=true"): 2, ("prompt", "zero2_tensor"): 4}
OFTEN = {("ia3", "pipeline"), ("prompt", "zero3"), ("p_tuning", "tensor")}
OFTEN |= {("prefix", "fsdp train.chunked_loss=true"), ("adapter", "ddp")}
OFTEN |= {("adapter", "fsdp train.activation_checkpointing=full")}
OWN = {
    "ia3": (),
    "adapter": ("tuning.bottleneck=8", "tuning.after_attention=true"),
    **dict.fromkeys(("prompt", "p_tuning", "prefix"), (f"tuning.virtual_tokens={COUNT}",)),
}
FLOAT64, FLOAT32 = 1e-10, 1e-5


def keys(method: str) -> tuple[str, ...]:
    return (f"tuning={method}", *COMMON, *OWN[method])


@once
def alone(method: str, precision: str, model: str = "llama") -> Trained:
    found = run_ranks(1, train, words(model, "single", precision, STEPS, *keys(method)))[0]
    assert found.losses[0] != found.losses[-1] and max(found.grad_norms) > 0.002, "it did not train, or did not clip"
    return found


@pytest.mark.parametrize(("method", "layout"), rows(LAYOUTS, lambda *case: case in OFTEN))
def test_layout_trains_what_one_process_trains(method: str, layout: str) -> None:
    precision = "fp32" if layout.startswith("zero") else "fp64"
    preset, *more = layout.split()
    count = LAYOUTS[method, layout]
    found = run_ranks(count, train, words("llama", preset, precision, STEPS, *keys(method), *more))[0]
    apart = distance(found, alone(method, precision))
    ROWS.append(Row(preset, " ".join([*more, *keys(method)]), count, "llama", precision, apart))
    assert apart.largest <= (FLOAT32 if precision == "fp32" else FLOAT64), apart


@pytest.mark.parametrize("method", rows(zip(METHODS[1:]), lambda method: method == "prompt"))
def test_a_mixture_with_divided_experts_trains_what_one_process_trains(method: str) -> None:
    found = run_ranks(2, train, words("mixtral", "expert", "fp64", STEPS, *keys(method)))[0]
    apart = distance(found, alone(method, "fp64", "mixtral"))
    ROWS.append(Row("expert", " ".join(keys(method)), 2, "mixtral", "fp64", apart))
    assert apart.largest <= FLOAT64, apart


def test_parity_sees_bottlenecks_that_each_rank_draws() -> None:
    given = words("llama", "fsdp", "fp64", STEPS, *keys("adapter"))
    broken = run_ranks(2, train_with, "adapters_drawn_by_each_rank", given)[0]
    assert distance(broken, alone("adapter", "fp64")).largest > 1e4 * FLOAT64


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.nightly)])
def test_peft_computes_what_was_trained(kind: str, tmp_path: Path) -> None:
    config = load_config(words(kind, "single", "fp32", STEPS))
    base = AutoModelForCausalLM.from_config(prepare_model(config).config)
    base.save_pretrained(tmp_path / "base")
    for method in OF_PEFT:
        given = [*words(kind, "single", "fp32", STEPS, *keys(method)), f"model.path={tmp_path / 'base'}"]
        given = [word for word in given if not word.startswith(("model=", "model.config"))]
        given += ["model.weights=pretrained", "optimizer=adamw", "optimizer.lr=0.1"]
        ours = run_ranks(1, train_and_export, given, tmp_path / method)[0]
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / method)
        ).eval()
        with torch.no_grad():
            theirs, before = loaded(input_ids=IDS).logits[:, -IDS.shape[1] :], base.eval()(input_ids=IDS).logits
        assert (ours - theirs).abs().max() <= 1e-5, method
        assert (ours - before).abs().max() > 1e-3, method


def test_an_exported_bottleneck_computes_what_was_trained(tmp_path: Path) -> None:
    """Any loader of the folder can read the adapter, and so can a run that continues from it. It is never merged."""
    base, made = tmp_path / "base", tmp_path / "made"
    plain = AutoModelForCausalLM.from_config(prepare_model(load_config(words("llama", "single", "fp32", STEPS))).config)
    plain.save_pretrained(base)
    given = [
        word for word in words("llama", "single", "fp32", STEPS) if not word.startswith(("model=", "model.config"))
    ]
    given += ["model.weights=pretrained", "optimizer=adamw", "optimizer.lr=0.1", "tuning=adapter"]
    ours = run_ranks(1, train_and_export, [*given, *OWN["adapter"], f"model.path={base}"], made)[0]
    loaded = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = loaded(input_ids=IDS).logits
        load_bottlenecks(loaded, made)
        assert (ours - loaded(input_ids=IDS).logits).abs().max() <= 1e-5
    assert (ours - before).abs().max() > 1e-3
    still = [word for word in given if not word.startswith("optimizer.lr")]
    again = run_ranks(1, train_and_export, [*still, "optimizer.lr=1e-30", f"model.path={made}"], tmp_path / "again")[0]
    assert (ours - again).abs().max() <= 1e-5
    with pytest.raises(
        ConfigError, match=r"^tuning=lora: .*set tuning=adapter to go on from it, or begin from its base"
    ):
        load_config(["tuning=lora", "model.weights=pretrained", f"model.path={made}"])
    with pytest.raises(DataError, match=r"holds a bottleneck adapter, which no matrix of its model can take up; use"):
        merge(made, tmp_path / "merged", dtype=torch.float32)


@pytest.mark.parametrize("method", rows([(m,) for m in METHODS], lambda method: method == "adapter"))
def test_a_run_goes_on_under_another_layout(method: str, tmp_path: Path) -> None:
    given = words("llama", "single", "fp64", 4, *keys(method), "logging.progress=lines", "checkpoint.every=2")
    given += ["scheduler=constant", "scheduler.warmup_steps=0"]
    whole, half, rest = tmp_path / "whole", tmp_path / "half", tmp_path / "rest"
    assert run_ranks(1, run_trainer, [*given, f"train.run_dir={whole}"]) == [0]
    first = [*given, f"train.run_dir={half}", "parallel=fsdp", "train.steps=2"]
    assert run_ranks(2, run_trainer, first) == [0, 0]
    assert run_ranks(1, run_trainer, [*given, f"train.run_dir={rest}", f"train.resume={half}"]) == [0]
    export(rest, tmp_path / "out", dtype=torch.float32)
    again, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", whole / "model")
    )
    assert again.keys() == expected.keys()
    assert max((again[key] - value).abs().max().item() for key, value in expected.items()) < 1e-6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("tuning=ia3 parallel=tensor", "parallel.tp=2: cuts features that tuning=ia3 multiplies by vectors it holds"),
        (
            "tuning=ia3 tuning.rank=4",
            "tuning.rank=4: is for lora, qlora, this is tuning=ia3; choose tuning=lora, or leave",
        ),
        (
            "tuning=adapter parallel=tensor",
            "parallel.tp=2: may cut what tuning=adapter reads, and it holds its matrices",
        ),
        ("tuning=adapter train.compile=true", "train.compile=true: compiles no layers with adapters behind them; set"),
        ("tuning=ia3 tuning.bottleneck=4", "tuning.bottleneck=4: is for bottleneck adapters, this is tuning=ia3;"),
        ("tuning=ia3 tuning.virtual_tokens=4", "tuning.virtual_tokens=4: is for prompt, p_tuning, prefix, this is"),
        (
            "tuning=prompt parallel=pipeline",
            "parallel.pp=2: passes on sequences of data.seq_len, and tuning=prompt puts",
        ),
        (
            "tuning=prompt parallel=context",
            "parallel.cp=2: passes on sequences of data.seq_len, and tuning=prompt puts",
        ),
        (
            "tuning=prefix parallel=tensor",
            "parallel.tp=2: gives each rank some heads, and tuning=prefix holds keys and",
        ),
        (
            "tuning=prefix train.activation_checkpointing=full",
            "train.activation_checkpointing=full: would put the keys",
        ),
        (
            "tuning=p_tuning data.document_mask=true",
            "data.document_mask=true: hides from a document what stands before",
        ),
        (
            "tuning=p_tuning train.chunked_loss=true",
            "train.chunked_loss=true: computes the loss in the head, which tuning=p_tuning gives 20 tokens more than",
        ),
        ("tuning=prompt tuning.virtual_tokens=4000", "tuning.virtual_tokens=4000: with data.seq_len=256 they are more"),
        (
            "tuning=prompt parallel=tensor parallel.sequence_parallel=true tuning.virtual_tokens=5",
            "tuning.virtual_tokens=5: parallel.sequence_parallel=true splits them with the text over parallel.tp=2;",
        ),
    ],
)
def test_what_cannot_be_combined_is_one_line(given: str, says: str) -> None:
    with pytest.raises(PlanError) as refused:
        make_plan(load_config(given.split()), Machine(gpus=2))
    assert [line for line in refused.value.problems if line.startswith(says)], refused.value.problems


def test_layers_without_a_module_for_the_mlp_are_one_line(tmp_path: Path) -> None:
    OPTConfig(num_hidden_layers=1, hidden_size=32, ffn_dim=64, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^tuning=adapter: layer 0 of OPTForCausalLM has no module for its MLP"):
        prepare_model(load_config(["tuning=adapter", f"model.path={tmp_path}"]))


def test_an_architecture_that_peft_s_table_lacks_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^tuning=ia3: peft does not say which layers of a cohere are keys"):
        prepare_model(load_config(["model=tiny", "tuning=ia3", "model.config.model_type=cohere"]))


def test_an_architecture_that_peft_knows_with_other_layers_is_one_line() -> None:
    """peft would train only two of three vectors."""
    words = ["model=tiny", "tuning=ia3", "model.config.model_type=mixtral", "model.config.num_local_experts=4"]
    with pytest.raises(ConfigError, match=r"^tuning=ia3: peft .* MixtralForCausalLM has no w2; use tuning=lora"):
        prepare_model(load_config(words))
