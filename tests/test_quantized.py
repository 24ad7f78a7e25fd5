"""`tuning=qlora`: the 4-bit base is the same on every rank and at every start, and its bytes are counted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ConfigError, PlanError
from configs.load import load_config
from tests.support.cases import run_trainer
from tests.support.harness import run_ranks
from tests.support.parity import MODELS, measure, reference
from tests.support.selection import rows
from trainer.estimate.estimate import estimate
from trainer.linear import convert
from trainer.linear.four_bit_layers import Linear4bit
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, build_model, decoder_layers
from trainer.plan.machine import Machine

STEPS = 5
QLORA = ("tuning=qlora", "tuning.rank=4", "train.gradient_accumulation_steps=2")
LAYOUTS = {
    **{"ddp": 2, "fsdp": 2, "fsdp train.activation_checkpointing=full": 2, "hsdp": 4, "fsdp_offload": 2},
    **{"fsdp parallel.reshard_after_forward=false": 2, "pipeline": 2, "pipeline_fsdp": 4, "context": 2},
}
# Other rows cover the parts of these layouts, and a row of test_parity covers offload.
REPEATED = ("fsdp", "hsdp", "fsdp_offload", "pipeline_fsdp", "fsdp parallel.reshard_after_forward=false")
# Two and four ranks cut the rows at boundaries of 64-value blocks; the scales are not quantized.
CUT = (*QLORA, "tuning.double_quantization=false", "model.config.hidden_size=256", "model.config.intermediate_size=512")
DIVIDED = {
    **{"tensor": 2, "tensor parallel.sequence_parallel=true train.activation_checkpointing=full": 2, "tensor_fsdp": 4},
    **{"tensor_data": 4, "3d": 8},
}
FLOAT32 = 1e-5


@pytest.mark.parametrize("layout", rows(zip(LAYOUTS), lambda layout: layout not in REPEATED))
def test_layout_trains_the_adapters_of_one_process(layout: str) -> None:
    # A new adapter's gradients are small; Adam divides them by small moments, which amplifies rounding.
    sgd = (*QLORA, "optimizer=sgd", "optimizer.lr=0.3")
    found = measure(layout.split(), LAYOUTS[layout], model="llama", precision="fp32", steps=STEPS, extra=sgd)
    assert found.largest <= FLOAT32
    assert all(".lora_" in name for name in reference("llama", "fp32", STEPS, *sgd).parameters)


@pytest.mark.parametrize("layout", rows(zip(DIVIDED), lambda layout: layout == "tensor"))
def test_matrices_cut_between_blocks_train_the_adapters_of_one_process(layout: str) -> None:
    sgd = (*CUT, "optimizer=sgd", "optimizer.lr=0.3")
    found = measure(layout.split(), DIVIDED[layout], model="llama", precision="fp32", steps=STEPS, extra=sgd)
    assert found.largest <= FLOAT32


def test_four_bits_are_near_the_model_and_are_not_it() -> None:
    """Before the first update the adapters add nothing, so the difference is due to quantization."""
    packed = reference("llama", "fp32", STEPS, *QLORA).losses[0]
    whole = reference("llama", "fp32", STEPS, *(word.replace("qlora", "lora") for word in QLORA)).losses[0]
    assert 1e-6 < abs(packed - whole) / whole < 2e-2


@pytest.mark.parametrize("double", [True, False])
def test_what_is_stored_is_what_was_counted(double: bool) -> None:
    config = load_config(["model=tiny", "tuning=qlora", f"tuning.double_quantization={str(double).lower()}"])
    model = build_model(config.model, build_hf_config(config.model))
    convert(model, config)
    unit = decoder_layers(model)[0]
    layers = {name: module for name, module in unit.named_modules() if isinstance(module, Linear4bit)}
    assert {name.split(".")[1] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    counted = {name: module.packed_bytes() for name, module in layers.items()}
    values = {}
    for name, module in layers.items():
        values[name] = torch.randn(module.values_shape(module.weight.shape))
        module._parameters["weight"] = torch.nn.Parameter(module.pack(values[name]), requires_grad=False)
    for name, module in layers.items():
        weight, state = module.get_parameter("weight"), module.quant_state
        scales = [state.state2.absmax, state.offset] if double else []
        held = [weight, state.absmax, *scales, state.code, *([state.state2.code] if double else [])]
        assert tuple(tensor.untyped_storage().nbytes() for tensor in held) == counted[name]
        again = module(torch.eye(values[name].shape[1])).T
        assert 0 < (again - values[name]).norm() / values[name].norm() < 0.12


def test_a_run_goes_on_to_the_bit_whatever_was_validated(tmp_path: Path) -> None:
    """The checkpoint lacks the base: it is quantized again from the same values, and validation does not change it."""
    common = [*MODELS["llama"], *QLORA, "data.seq_len=32", "train.global_batch_size=8", "logging.progress=lines"]
    common += ["precision=fp32", "checkpoint.every=2", "scheduler=constant", "train.steps=4"]
    whole, half, rest = tmp_path / "whole", tmp_path / "half", tmp_path / "rest"
    assert run_ranks(1, run_trainer, [*common, "train.eval_samples=0", f"train.run_dir={whole}"]) == [0]
    validated = [*common, "train.eval_samples=4", "train.eval_every=1"]
    assert run_ranks(1, run_trainer, [*validated, "train.steps=2", f"train.run_dir={half}"]) == [0]
    resume = [f"train.run_dir={rest}", f"train.resume={half}"]
    assert run_ranks(1, run_trainer, [*validated, *resume]) == [0]
    tensors, again = (load_file(run / "model" / "adapter_model.safetensors") for run in (whole, rest))
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    saved = [name for file in (half / "checkpoints").rglob("*.safetensors") for name in load_file(file)]
    assert saved
    assert all(".lora_" in name or name.startswith("rng/") for name in saved)


PAIRS = (("single", "fsdp"), ("fsdp", "tensor"), ("tensor", "pipeline"), ("pipeline", "single"))


# The fast row goes from FSDP shards to TP-sharded matrices; in the others one side has whole matrices.
@pytest.mark.parametrize("pairs", rows([(PAIRS[1:2],), (PAIRS,)], lambda pairs: len(pairs) == 1))
def test_a_run_goes_on_under_another_layout(pairs: Sequence[tuple[str, str]], tmp_path: Path) -> None:
    common = [*MODELS["llama"], *QLORA, "data.seq_len=32", "train.global_batch_size=8", "logging.progress=lines"]
    common += ["precision=fp32", "checkpoint.every=2", "scheduler=constant", "optimizer=sgd", "optimizer.lr=0.3"]
    common += CUT[-3:]
    layouts = {"single": 1, "fsdp": 2, "tensor": 2, "pipeline": 2}
    found = []
    for layout in {"single", *(before for before, _ in pairs)}:
        first = [*common, f"parallel={layout}", "train.steps=2", "train.export=false"]
        assert set(run_ranks(layouts[layout], run_trainer, [*first, f"train.run_dir={tmp_path / layout}"])) == {0}
    for before, after in (("single", "single"), *pairs):
        half, rest = tmp_path / before, tmp_path / f"{before} {after}"
        second = [*common, f"parallel={after}", "train.steps=4", f"train.run_dir={rest}", f"train.resume={half}"]
        assert set(run_ranks(layouts[after], run_trainer, second)) == {0}
        found.append(load_file(rest / "model" / "adapter_model.safetensors"))
    for name, value in found[0].items():
        assert all((other[name] - value).abs().max() <= FLOAT32 * value.abs().max() for other in found[1:]), name


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ("parallel=tensor", "parallel.tp=2: cuts matrices, and tuning.double_quantization=true packs scales across"),
        ("parallel=zero2", "tuning=qlora"),
        ("parallel=single precision=fp64", "precision=fp64"),
        ("parallel=single train.compile=true", "train.compile=true"),
        ("tuning=lora tuning.double_quantization=false", "tuning.double_quantization=false"),
    ],
)
def test_where_it_cannot_run_is_one_line(overrides: str, key: str) -> None:
    config = load_config(["tuning=qlora", *overrides.split()])
    with pytest.raises(PlanError) as caught:
        make_plan(config, Machine(world_size=2, local_world_size=2))
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith(key)]
    assert "use" in line or "set" in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            "model.config.hidden_size=192",
            r"parallel.tp=2: model.layers.0.self_attn.o_proj\S* has 3 packed blocks in a row",
        ),
        (
            "model.config.num_key_value_heads=1",
            r"parallel.tp=2: model.layers.0.self_attn.[kv]_proj\S* is packed and has fewer",
        ),
    ],
)
def test_a_cut_through_a_block_is_one_line(overrides: str, line: str) -> None:
    tensor = ["model=tiny", "parallel=tensor", "data=synthetic", "tuning=qlora", "tuning.double_quantization=false"]
    config = load_config([*tensor, *overrides.split()])
    with pytest.raises(PlanError, match=line):
        estimate(config, make_plan(config, Machine(world_size=2, local_world_size=2)))


def test_a_model_without_linear_layers_is_refused() -> None:
    config = load_config(["model=tiny_gpt2", "tuning=qlora"])
    model = build_model(config.model, build_hf_config(config.model))
    with pytest.raises(
        ConfigError, match=r"^tuning=qlora: the decoder layers of GPT2LMHeadModel have no torch.nn.Linear"
    ):
        convert(model, config)
