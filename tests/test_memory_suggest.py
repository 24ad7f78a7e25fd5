"""What fits: the largest micro-batch, and the changes that are named where a layout does not."""

from __future__ import annotations

import pytest

from configs.load import load_config
from launch.estimate import answer, main
from tests.support.estimate_cases import answer_json
from trainer.estimate.estimate import estimate
from trainer.estimate.profiles import get_profile
from trainer.estimate.suggest import _extrapolate, largest_micro_batch
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine


@pytest.mark.parametrize("chunked", ["true", "false"])
def test_fits_and_names_the_largest_micro_batch(chunked: str, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_1_8b", "parallel=fsdp", "precision=bf16", "cluster=8xh100", "data.seq_len=2048", cache]
    words.append(f"train.chunked_loss={chunked}")
    code, found = answer_json([*words, "train.micro_batch_size=1"], capsys)
    assert code == 0 and found["fits"] is True and found["suggestions"] == []
    largest = found["largest_micro_batch"]
    assert isinstance(largest, int) and largest >= 1
    assert main([*words, f"train.micro_batch_size={largest}"]) == 0
    assert main([*words, f"train.micro_batch_size={largest + 1}"]) == 3


def test_what_does_not_fit_comes_with_changes_that_do(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_2_1b", "cluster=4xa10", "cluster.gpus_per_node=8"]
    words += ["parallel=ddp", "data.seq_len=1024", cache]
    code, found = answer_json(words, capsys)
    suggestions = found["suggestions"]
    assert code == 3 and found["fits"] is False and isinstance(suggestions, list) and suggestions
    again, changed = answer_json([*words, *suggestions[0]["overrides"]], capsys)
    assert again == 0
    assert changed["peak_reserved_bytes"] == suggestions[0]["peak_reserved_bytes"]


def test_of_a_weaker_and_a_stronger_change_the_stronger_is_named(cache: str) -> None:
    words = ["model=tiny", "parallel=ddp", "cluster=8xh100", "data.seq_len=1024", "train.micro_batch_size=16", cache]
    room = ["cluster.gpu_memory_gib=0.08", "estimate.context_gib=0", "estimate.nccl_gib=0"]
    room += ["cluster.expandable_segments=false"]  # which grow by 20 MiB, much for so small a model
    suggestions = answer([*words, *room]).suggestions
    assert suggestions
    found = suggestions[0]
    assert "recompute whole layers" in found.why and "every second product" not in found.why
    assert "train.activation_checkpointing=full" in found.overrides and found.estimate.fits


def test_a_change_that_is_refused_does_not_keep_later_ones_away(cache: str) -> None:
    """Of matrices in 4 bits none can be divided; offload, which comes after, needs the sharding that came before."""
    words = ["model=llama3_2_1b", "tuning=qlora", "tuning.rank=1024", "parallel=ddp", "precision=bf16", cache]
    words += ["cluster=8xl4", "cluster.gpus_per_node=2", "data.seq_len=512", "train.micro_batch_size=1"]
    suggestions = answer([*words, "cluster.gpu_memory_gib=5"]).suggestions
    assert suggestions
    found = suggestions[0]
    assert {"parallel.dp_shard=null", "parallel.offload.parameters=cpu"} <= set(found.overrides)
    assert not any(word.startswith("parallel.tp=") for word in found.overrides)
    assert answer([*words, "cluster.gpu_memory_gib=5", *found.overrides]).estimate.fits
    assert answer([*words, "cluster.gpu_memory_gib=2"]).suggestions == []


def test_extrapolated_traces_equal_traced_ones(cache: str) -> None:
    config = load_config(["model=tiny_qwen3", "parallel=fsdp", "precision=bf16", "cluster=8xh100", cache])
    plan = make_plan(config, Machine(gpus=8))
    gpu = estimate(config, plan).device.gpu
    one, two, seven = (get_profile(config, plan, gpu, micro_batch_size=size) for size in (1, 2, 7))
    assert _extrapolate(one, two, 6) == seven


def test_largest_micro_batch_needs_a_device(cache: str) -> None:
    config = load_config(["model=tiny", "parallel=single", "cluster.device=cpu", cache])
    assert largest_micro_batch(config, make_plan(config, Machine())) is None
