"""Parity tests on CUDA with NCCL, on all available GPUs. They are skipped if there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.load import load_config
from tests.support.cases import train
from tests.support.harness import run_ranks
from tests.support.parity import Trained, distance, measure, words
from trainer.model.build import build_hf_config

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="no CUDA device")
ACCUMULATE = ("train.gradient_accumulation_steps=2", "cluster.device=cuda")
LAYOUTS = {
    "ddp": 2,
    "fsdp": 2,
    "tensor": 2,
    "pipeline": 2,
    "context": 2,
    "hsdp": 4,
    "tensor_fsdp": 4,
    "pipeline_fsdp": 4,
    "3d_zero1": 8,
}


def on_both(model: str, precision: str, folder: Path, *keys: str) -> tuple[Trained, Trained]:
    """Train on the GPU and the CPU from the same weights, loaded from a folder since their generators differ."""
    config = load_config(words(model, "single", precision, 5))
    AutoModelForCausalLM.from_config(build_hf_config(config.model)).save_pretrained(folder)
    keys = (*keys, f"model.path={folder}", "model.weights=pretrained", "data.tokenizer=bytes")
    gpu, cpu = (
        run_ranks(1, train, words(model, "single", precision, 5, *keys, f"cluster.device={device}"))[0]
        for device in ("cuda", "cpu")
    )
    assert gpu.losses[-1] < gpu.losses[0]
    return gpu, cpu


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_one_gpu_equals_the_cpu(model: str, tmp_path: Path) -> None:
    gpu, cpu = on_both(model, "fp64", tmp_path, "train.gradient_accumulation_steps=2")
    assert distance(gpu, cpu).largest <= 1e-8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_single_process(layout: str) -> None:
    if LAYOUTS[layout] > GPUS:
        pytest.skip(f"{LAYOUTS[layout]} GPUs are needed, there are {GPUS}")
    found = measure([layout], LAYOUTS[layout], model="llama", precision="fp64", steps=5, extra=ACCUMULATE)
    assert found.largest <= 1e-10, found


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_lower_precision_stays_near_float32(precision: str) -> None:
    full = run_ranks(1, train, words("llama", "single", "fp32", 10, *ACCUMULATE))[0]
    lower = run_ranks(1, train, words("llama", "single", precision, 10, *ACCUMULATE, "precision.loss_scale_init=1024"))[
        0
    ]
    assert max(abs(a - b) for a, b in zip(full.losses, lower.losses, strict=True)) < 2e-2
    assert lower.losses[-1] < lower.losses[0]


def test_layouts_agree_in_bf16() -> None:
    if GPUS < 2:
        pytest.skip("2 GPUs are needed")
    ranks = run_ranks(2, train, words("llama", "ddp", "bf16", 10, *ACCUMULATE))
    single = run_ranks(1, train, words("llama", "single", "bf16", 10, *ACCUMULATE))[0]
    assert distance(ranks[0], single).loss < 2e-3


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_the_model_beneath_adapters_is_that_of_the_cpu(tuning: str, tmp_path: Path) -> None:
    """Compares the first loss. Adapters add nothing to it yet, and each device draws its own initial values.

    The test also covers 4-bit codes.
    """
    keys = (f"tuning={tuning}", "tuning.rank=4", "optimizer=sgd", "optimizer.lr=0.3")
    gpu, cpu = on_both("llama", "fp32", tmp_path, *keys)
    assert gpu.losses[0] == pytest.approx(cpu.losses[0], rel=1e-4)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp_offload", "pipeline", "tensor", "tensor_fsdp"])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_adapters_of_a_layout_are_those_of_one_gpu(tuning: str, layout: str) -> None:
    processes = LAYOUTS.get(layout, 2)
    if processes > GPUS:
        pytest.skip(f"{processes} GPUs are needed, there are {GPUS}")
    keys = (f"tuning={tuning}", "tuning.rank=4", "optimizer=sgd", "optimizer.lr=0.3", *ACCUMULATE)
    if tuning == "qlora" and "tensor" in layout:
        sizes = ("model.config.hidden_size=256", "model.config.intermediate_size=512")
        keys = (*keys, "tuning.double_quantization=false", *sizes)
    found = measure([layout], processes, model="llama", precision="fp32", steps=5, extra=keys)
    assert found.largest <= 1e-4, found
