"""The estimate suggests the largest micro-batch that fits, and changes if a layout does not fit."""

from __future__ import annotations

import pytest

from configs.errors import PlanError
from configs.load import load_config
from launch.answers import answer
from tests.support.estimate_cases import answer_json
from tests.support.selection import rows
from trainer.estimate.estimate import estimate
from trainer.estimate.profiles import get_profile
from trainer.estimate.suggest import _extrapolate, largest_micro_batch
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine


@pytest.mark.parametrize("chunked", rows(zip(("true", "false")), lambda chunked: chunked == "true"))
def test_fits_and_names_the_largest_micro_batch(chunked: str, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_1_8b", "parallel=fsdp", "precision=bf16", "cluster=8xh100", "data.seq_len=2048", cache]
    words.append(f"train.chunked_loss={chunked}")
    code, found = answer_json([*words, "train.micro_batch_size=1"], capsys)
    assert code == 0 and found["fits"] is True and found["suggestions"] == []
    largest = found["largest_micro_batch"]
    assert isinstance(largest, int) and largest >= 1
    verdicts = [answer_json([*words, f"train.micro_batch_size={largest + more}"], capsys)[1] for more in (0, 1)]
    assert verdicts[0]["verdict"] == "fits" != verdicts[1]["verdict"]


def test_what_does_not_fit_comes_with_changes_that_do(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_2_1b", "cluster=4xa10", "cluster.gpus_per_node=8"]
    words += ["parallel=ddp", "data.seq_len=1024", cache]
    code, found = answer_json(words, capsys)
    suggestions = found["suggestions"]
    assert code == 3 and found["fits"] is False and isinstance(suggestions, list) and suggestions
    again, changed = answer_json([*words, *suggestions[0]["overrides"]], capsys)
    assert again == 0 and changed["verdict"] == "fits"
    assert changed["peak_reserved_bytes"] == suggestions[0]["peak_reserved_bytes"]


# This behaviour has no other test, but the test takes a CPU minute.
@pytest.mark.nightly
def test_of_a_weaker_and_a_stronger_change_the_stronger_is_named(cache: str) -> None:
    words = ["model=tiny", "parallel=ddp", "cluster=8xh100", "data.seq_len=1024", "train.micro_batch_size=16", cache]
    room = ["cluster.gpu_memory_gib=0.1", "estimate.context_gib=0", "estimate.nccl_gib=0"]
    room += ["cluster.expandable_segments=false"]  # they grow by 20 MiB, too coarse for this small model
    suggestions = answer([*words, *room]).suggestions
    assert suggestions
    found = suggestions[0]
    assert "recompute whole layers" in found.why and "every second product" not in found.why
    assert "train.activation_checkpointing=full" in found.overrides and found.estimate.fits


LARGE = ["model=tiny", "parallel=ddp", "cluster=8xh100", "data.seq_len=1024", "train.micro_batch_size=16"]
LARGE += ["train.chunked_loss=false"]
ROOM = ["estimate.context_gib=0", "estimate.nccl_gib=0", "cluster.expandable_segments=false"]


def test_one_change_is_named_where_one_is_enough(cache: str) -> None:
    """The fastest change of one key comes before changes of two keys."""
    found = answer([*LARGE, *ROOM, "cluster.gpu_memory_gib=1", cache])
    assert found.estimate.too_large and found.suggestions
    sizes = [len(one.overrides) for one in found.suggestions]
    assert sizes == sorted(sizes) and sizes[0] == 1
    assert all(one.estimate.fits and " + " not in one.why for one in found.suggestions)


def test_no_more_is_changed_than_is_needed(cache: str) -> None:
    """If two changes are needed, exactly two are suggested. The layout does not fit without either of them."""
    words = [*LARGE, *ROOM, "cluster.gpu_memory_gib=0.25", cache]
    suggestions = answer(words).suggestions
    assert suggestions
    found = suggestions[0]
    assert found.why.count(" + ") == 1 and found.estimate.fits
    for word in found.overrides:
        if not word.startswith(("parallel.dp_replicate", "train.gradient_accumulation")):  # half of a change
            try:
                left = answer([*words, *(other for other in found.overrides if other != word)])
            except PlanError:
                continue
            assert not left.estimate.fits, word


def test_the_fewest_nodes_are_named(cache: str) -> None:
    words = ["model=llama3_2_1b", "parallel=fsdp", "precision=bf16", "cluster=8xh100", "data.seq_len=256", cache]
    words += ["train.micro_batch_size=1", "cluster.gpu_memory_gib=6"]
    suggestions = answer(words).suggestions
    assert suggestions
    (word,) = suggestions[-1].overrides
    assert word.startswith("cluster.nodes=") and suggestions[-1].why == f"this layout on {word[14:]} nodes"
    fewer = answer([*words, f"cluster.nodes={int(word[14:]) - 1}", "estimate.suggest=false"])
    assert suggestions[-1].estimate.fits and not fewer.estimate.fits


def test_adapters_are_named_where_one_gpu_cannot_train_all(cache: str) -> None:
    """8B in float32 with AdamW takes 16 bytes per parameter, and a single GPU cannot shard them."""
    words = ["model=llama3_1_8b", "parallel=single", "cluster.gpu=H100-SXM", "cluster.gpus_per_node=1", cache]
    suggestions = answer([*words, "data.seq_len=256", "train.micro_batch_size=1"]).suggestions
    assert suggestions and [one.overrides for one in suggestions] == [("tuning.method=lora",)]


def test_a_change_that_is_refused_does_not_keep_later_ones_away(cache: str) -> None:
    """Tensor parallel is refused for 4-bit matrices. Offload is tried later and needs the sharding tried earlier."""
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
