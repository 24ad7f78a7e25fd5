"""Predicted memory equals measured memory. The real engine of each layout runs several models on the CPU, and the tests
count its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from tests.support.harness import run_ranks
from tests.support.memory_cases import Measured, measure
from tests.support.selection import rows
from trainer.estimate.estimate import estimate
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

TORCH, DEEPSPEED = 0.05, 0.10
SCALARS = 4096  # bytes of counters, losses and norms, which the estimate leaves out

LLAMA = ["model=tiny", "model.config.vocab_size=307"]
MANY_WORDS = ["model=tiny", "model.config.vocab_size=49157"]  # logits beyond `vocabulary.WIDE_ELEMENTS`
GPT2 = ["model=tiny_gpt2", "model.config.n_embd=96", "model.config.resid_pdrop=0.1"]
QWEN3 = ["model=tiny_qwen3", "model.config.num_hidden_layers=6"]
GEMMA2 = [
    "model=gemma2_2b",
    "model.config.hidden_size=64",
    "model.config.num_hidden_layers=7",
    "model.config.intermediate_size=160",
    "model.config.vocab_size=301",
    "model.config.sliding_window=32",
]
MIXTRAL = [
    *LLAMA,
    "model.config.model_type=mixtral",
    "model.config.num_local_experts=4",
    "model.config.num_hidden_layers=3",
]
SHORT = ["data.seq_len=32", "train.micro_batch_size=1"]
LONG = ["data.seq_len=128", "train.micro_batch_size=3"]
BF16 = ["precision=bf16"]
FP16 = ["precision=fp16", "precision.loss_scale_init=1024"]  # low enough that no update is skipped
SEQUENCE = ["parallel.sequence_parallel=true"]
TWICE = ["train.gradient_accumulation_steps=2"]
FOUR = ["train.gradient_accumulation_steps=4"]
SIX = ["train.gradient_accumulation_steps=6"]
ADAFACTOR = ["optimizer=adafactor"]
EIGHT_BITS = ["optimizer=adamw_8bit"]
MUON = ["optimizer=muon", "optimizer.options.dtype=float32"]
LOMO = ["optimizer=lomo"]
FP8 = ["precision=fp8"]
MEZO = ["optimizer=mezo"]
AVERAGED = ["optimizer=schedule_free", "scheduler=constant"]  # validation puts the training weights aside
CUT = ["tuning=qlora", "tuning.double_quantization=false", "model.config.intermediate_size=512"]  # cuts between blocks
FULL = ["train.activation_checkpointing=full"]
SELECTIVE = ["train.activation_checkpointing=selective"]

CASES = {
    "single fp32": (1, TORCH, ["parallel=single", *LLAMA, *LONG]),
    "single fp64 sgd foreach": (1, TORCH, ["parallel=single", *LLAMA, *SHORT, "precision=fp64", "optimizer=sgd"]),
    "single autocast, recompute": (1, TORCH, ["parallel=single", *QWEN3, *LONG, *BF16, *FULL, *TWICE]),
    "single, two kinds of layers": (1, TORCH, ["parallel=single", *GEMMA2, *LONG, *BF16, *SELECTIVE]),
    "single fp32, adafactor": (
        1,
        TORCH,
        ["parallel=single", "model=tiny", *SHORT, *ADAFACTOR, "model.config.vocab_size=4099"],
    ),
    "single eager, foreach": (
        1,
        TORCH,
        ["parallel=single", *GPT2, *SHORT, "model.attention=eager", "optimizer.implementation=foreach"],
    ),
    "single fp32, routed experts": (1, TORCH, ["parallel=single", *MIXTRAL, *LONG]),
    "single bf16, documents kept apart": (
        1,
        TORCH,
        ["parallel=single", *LLAMA, *LONG, *BF16, "data=builtin", "data.document_mask=true"],
    ),
    "single bf16, loss in slices": (
        1,
        TORCH,
        ["parallel=single", *MANY_WORDS, *LONG, *BF16, "train.chunked_loss=true", "data.seq_len=256"],
    ),
    "tensor fp32, loss in slices": (2, TORCH, ["parallel=tensor", *MANY_WORDS, *LONG, "data.seq_len=512"]),
    "ddp bf16, adapters": (2, TORCH, ["parallel=ddp", *LLAMA, *LONG, *BF16, *TWICE, "tuning=lora"]),
    "single bf16, adapters over 4 bits": (1, TORCH, ["parallel=single", *LLAMA, *LONG, *BF16, "tuning=qlora"]),
    "ddp fp32, adapters over 4 bits, recompute": (
        2,
        TORCH,
        ["parallel=ddp", *QWEN3, *SHORT, *FULL, "tuning=qlora", "tuning.double_quantization=false"],
    ),
    "fsdp bf16, adapters over 4 bits": (
        3,
        TORCH,
        ["parallel=fsdp", *LLAMA, *LONG, *BF16, *TWICE, "tuning=qlora"],
    ),
    "tensor_fsdp bf16, adapters over 4 bits": (
        4,
        TORCH,
        ["parallel=tensor_fsdp", *LLAMA, *LONG, *BF16, *TWICE, *CUT],
    ),
    "pipeline_fsdp fp32, adapters over 4 bits": (
        4,
        TORCH,
        ["parallel=pipeline_fsdp", *LLAMA, *SHORT, *FOUR, "tuning=qlora", "tuning.double_quantization=false"],
    ),
    "fsdp fp32, adapters": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT, "tuning=lora", "tuning.rank=4"]),
    "fsdp bf16, adapters, recompute": (2, TORCH, ["parallel=fsdp", *GPT2, *SHORT, *BF16, *FULL, "tuning=lora"]),
    "zero1 bf16, adapters": (2, DEEPSPEED, ["parallel=zero1", *LLAMA, *SHORT, *BF16, *TWICE, "tuning=lora"]),
    "zero2 fp32, adapters": (2, DEEPSPEED, ["parallel=zero2", *LLAMA, *SHORT, "tuning=lora"]),
    "zero3 bf16, adapters, recompute": (2, DEEPSPEED, ["parallel=zero3", *QWEN3, *LONG, *BF16, *FULL, "tuning=lora"]),
    "pipeline bf16, adapters, tied": (2, TORCH, ["parallel=pipeline", *QWEN3, *LONG, *BF16, *FOUR, "tuning=lora"]),
    "tensor bf16, adapters": (2, TORCH, ["parallel=tensor", *LLAMA, *LONG, *BF16, *TWICE, "tuning=lora"]),
    "tensor sequence fp32, adapters, copied": (
        4,
        TORCH,
        ["parallel=tensor", "parallel.tp=4", *QWEN3, *SHORT, *SEQUENCE, "tuning=lora", "tuning.dropout=0.1"],
    ),
    "tensor_fsdp bf16, adapters, tied": (
        4,
        TORCH,
        ["parallel=tensor_fsdp", *GPT2, *LONG, *BF16, *FULL, "tuning=lora"],
    ),
    "zero2_tensor bf16, adapters": (4, DEEPSPEED, ["parallel=zero2_tensor", *LLAMA, *SHORT, *BF16, "tuning=lora"]),
    "fsdp bf16, adafactor, tied": (2, TORCH, ["parallel=fsdp", *GPT2, *SHORT, *BF16, *ADAFACTOR]),
    "ddp autocast, 8-bit states, tied": (2, TORCH, ["parallel=ddp", *GPT2, *LONG, *BF16, *EIGHT_BITS]),
    "tensor fp32, 8-bit states": (2, TORCH, ["parallel=tensor", *GPT2, *SHORT, *EIGHT_BITS]),
    "fsdp bf16, optimizer by its path": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT, *BF16, "optimizer=custom"]),
    "tensor_fsdp fp32, 8-bit states": (4, TORCH, ["parallel=tensor_fsdp", *LLAMA, *SHORT, *EIGHT_BITS]),
    "single fp32, averaged weights, updated in the backward": (
        1,
        TORCH,
        ["parallel=single", *LLAMA, *SHORT, *AVERAGED, "optimizer.in_backward=true"],
    ),
    "fsdp bf16, averaged weights": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT, *BF16, *AVERAGED]),
    "fsdp fp32, an optimizer for each role": (
        2,
        TORCH,
        ["parallel=fsdp", *LLAMA, *SHORT, "optimizer.groups.matrix.name=adafactor", "optimizer.groups.head.name=lion"],
    ),
    "ddp fp32, muon, routed experts": (2, TORCH, ["parallel=ddp", *MIXTRAL, *SHORT, *MUON]),
    "expert bf16": (4, TORCH, ["parallel=expert", *MIXTRAL, *SHORT, *BF16, *TWICE]),
    "expert_fsdp fp32, muon": (4, TORCH, ["parallel=expert_fsdp", *MIXTRAL, *SHORT, *MUON]),
    "tensor_fsdp bf16, muon, tied": (4, TORCH, ["parallel=tensor_fsdp", *GPT2, *SHORT, *BF16, *MUON]),
    "single fp32, adafactor in the backward": (
        1,
        TORCH,
        ["parallel=single", "model=tiny", *SHORT, "optimizer=adalomo", "train.clip_grad_norm=0"],
    ),
    "ddp fp32, adamw in the backward, tied": (2, TORCH, ["parallel=ddp", *GPT2, *SHORT, "optimizer.in_backward=true"]),
    "ddp bf16, mezo, tied": (2, TORCH, ["parallel=ddp", *GPT2, *SHORT, *BF16, *TWICE, *MEZO]),
    "fsdp fp32, mezo, kept gathered": (
        2,
        TORCH,
        ["parallel=fsdp", *LLAMA, *LONG, *MEZO, "parallel.reshard_after_forward=false"],
    ),
    "tensor_fsdp bf16, mezo": (4, TORCH, ["parallel=tensor_fsdp", *LLAMA, *SHORT, *BF16, *MEZO]),
    "ddp bf16, lomo, reduced in bf16": (
        2,
        TORCH,
        ["parallel=ddp", *LLAMA, *SHORT, *BF16, *LOMO, "precision.reduce_dtype=bfloat16"],
    ),
    "fsdp fp32, lomo": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT, *LOMO, "train.clip_grad_norm=0"]),
    "fsdp bf16, adamw in the backward, uneven": (
        3,
        TORCH,
        ["parallel=fsdp", *QWEN3, *SHORT, *BF16, *FULL, "optimizer.in_backward=true"],
    ),
    "hsdp bf16, lomo": (4, TORCH, ["parallel=hsdp", *QWEN3, *SHORT, *BF16, *LOMO]),
    "single fp8": (1, TORCH, ["parallel=single", *LLAMA, *LONG, *FP8]),
    "fsdp fp8": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT, *FP8]),
    "ddp fp32, tied": (2, TORCH, ["parallel=ddp", *GPT2, *SHORT]),
    "ddp autocast, accumulation": (2, TORCH, ["parallel=ddp", *LLAMA, *LONG, *BF16, *TWICE]),
    "fsdp fp32": (2, TORCH, ["parallel=fsdp", *LLAMA, *SHORT]),
    "fsdp bf16, routed experts that the ranks do not divide, sgd": (
        2,
        TORCH,
        [
            *("parallel=fsdp", *MIXTRAL, *SHORT, *BF16, *TWICE, "model.config.num_local_experts=3", "optimizer=sgd"),
            *("moe=global_batch", "moe.coefficient=0.01"),
        ],
    ),
    "fsdp bf16, uneven, recompute": (3, TORCH, ["parallel=fsdp", *LLAMA, *LONG, *BF16, *FULL, *TWICE]),
    "fsdp kept, reduced in bf16": (
        2,
        TORCH,
        [
            "parallel=fsdp",
            *GPT2,
            *LONG,
            *BF16,
            "precision.reduce_dtype=bfloat16",
            "parallel.reshard_after_forward=false",
        ],
    ),
    "hsdp bf16, accumulation": (4, TORCH, ["parallel=hsdp", *QWEN3, *SHORT, *BF16, *TWICE]),
    "tensor fp32": (2, TORCH, ["parallel=tensor", *LLAMA, *SHORT]),
    "tensor fp16, tied, foreach": (
        2,
        TORCH,
        ["parallel=tensor", *GPT2, *SHORT, "precision=fp16", *TWICE, "optimizer.implementation=foreach"],
    ),
    "tensor, key-value heads copied": (4, TORCH, ["parallel=tensor", "parallel.tp=4", *QWEN3, *SHORT, *BF16]),
    "tensor sequence, recompute": (2, TORCH, ["parallel=tensor", *QWEN3, *LONG, *BF16, *SEQUENCE, *FULL, *TWICE]),
    "tensor_data": (4, TORCH, ["parallel=tensor_data", *GPT2, *SHORT, *BF16, *TWICE]),
    "zero1_tensor bf16": (4, DEEPSPEED, ["parallel=zero1_tensor", *LLAMA, *SHORT, *BF16, *SEQUENCE]),
    "zero2_tensor fp32, tied, recompute": (4, DEEPSPEED, ["parallel=zero2_tensor", *GPT2, *LONG, *FULL, *TWICE]),
    "tensor_fsdp": (4, TORCH, ["parallel=tensor_fsdp", *LLAMA, *LONG, *BF16, *TWICE, *SEQUENCE]),
    "pipeline 1f1b, uneven": (2, TORCH, ["parallel=pipeline", *LLAMA, *SHORT, *FOUR, "parallel.pipeline.split=[1,3]"]),
    "pipeline gpipe, tied": (
        2,
        TORCH,
        ["parallel=pipeline", *GPT2, *LONG, *BF16, *FOUR, "parallel.pipeline.schedule=gpipe"],
    ),
    "pipeline interleaved, recompute": (
        2,
        TORCH,
        ["parallel=pipeline", *QWEN3, *LONG, *FULL, *FOUR, "parallel.pipeline.schedule=interleaved_1f1b"],
    ),
    "pipeline interleaved zero bubble": (
        2,
        TORCH,
        ["parallel=pipeline", *LLAMA, *SHORT, *FOUR, "parallel.pipeline.schedule=interleaved_zero_bubble"],
    ),
    "pipeline zero bubble in a V, tied": (
        2,
        TORCH,
        ["parallel=pipeline", *QWEN3, *LONG, *BF16, *SIX, "parallel.pipeline.schedule=zbv_zero_bubble"],
    ),
    "pipeline dualpipev, recompute": (
        2,
        TORCH,
        ["parallel=pipeline", *GPT2, *LONG, *FULL, *SIX, "parallel.pipeline.schedule=dualpipev"],
    ),
    "pipeline_data looped": (
        4,
        TORCH,
        ["parallel=pipeline_data", *QWEN3, *SHORT, *BF16, *FOUR, "parallel.pipeline.schedule=looped_bfs"],
    ),
    "pipeline_fsdp": (4, TORCH, ["parallel=pipeline_fsdp", *LLAMA, *LONG, *BF16, *FOUR]),
    "3d sequence": (8, TORCH, ["parallel=3d", *LLAMA, *SHORT, *BF16, *TWICE, *SEQUENCE]),
    "3d_zero1, recompute": (8, TORCH, ["parallel=3d_zero1", *LLAMA, *LONG, *BF16, *FULL, *TWICE]),
    "context ulysses, chunked loss": (
        2,
        TORCH,
        ["parallel=context", "parallel.dp_shard=1", *LLAMA, *LONG, "train.chunked_loss=true"],
    ),
    "context gather": (4, TORCH, ["parallel=context", *QWEN3, *LONG, *BF16, *TWICE, "parallel.context_method=gather"]),
    "context x pipeline x tensor": (
        8,
        TORCH,
        ["parallel=context", "parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=1", *LLAMA, *SHORT, *TWICE],
    ),
    "zero1 bf16": (2, DEEPSPEED, ["parallel=zero1", *LLAMA, *SHORT, *BF16, *TWICE]),
    "zero1 fp32": (2, DEEPSPEED, ["parallel=zero1", *LLAMA, *SHORT, *TWICE]),
    "zero1 fp16, tied, sgd": (2, DEEPSPEED, ["parallel=zero1", *GPT2, *SHORT, *FP16, "optimizer=sgd"]),
    "zero1 bf16, offload": (3, DEEPSPEED, ["parallel=zero1_offload", *QWEN3, *SHORT, *BF16, *TWICE]),
    "zero1 fp32, offload": (2, DEEPSPEED, ["parallel=zero1_offload", *GPT2, *LONG, *TWICE]),
    "zero2 fp32": (3, DEEPSPEED, ["parallel=zero2", *LLAMA, *LONG, *TWICE]),
    "zero2 fp32, offload": (2, DEEPSPEED, ["parallel=zero2_offload", *QWEN3, *SHORT, *TWICE]),
    "zero2 fp16": (2, DEEPSPEED, ["parallel=zero2", *GPT2, *SHORT, *FP16, *TWICE]),
    "zero2 bf16": (2, DEEPSPEED, ["parallel=zero2", *QWEN3, *LONG, *BF16, *FULL]),
    "zero2 bf16, offload": (2, DEEPSPEED, ["parallel=zero2_offload", *GPT2, *SHORT, *BF16]),
    "zero3 bf16": (2, DEEPSPEED, ["parallel=zero3", *LLAMA, *LONG, *BF16, *TWICE]),
    "zero3 fp32": (2, DEEPSPEED, ["parallel=zero3", *GPT2, *SHORT]),
    "zero3 bf16, offload": (2, DEEPSPEED, ["parallel=zero3_offload", *LLAMA, *SHORT, *BF16]),
}
# Settings of `parallel.deepspeed` and `parallel.fsdp` that change the memory: ranks, tolerance, layout, settings.
MOVING: dict[str, tuple[int, float, str, tuple[str, ...]]] = {
    "fsdp, gathered ahead": (2, TORCH, "fsdp", ("forward_prefetch=2", "backward_prefetch=3")),
    "fsdp, gathered from fewer": (4, TORCH, "fsdp", ("reshard_size=2",)),
    "zero2, overlapped": (2, DEEPSPEED, "zero2", ("overlap_comm=true",)),
    "zero2, small buckets": (2, DEEPSPEED, "zero2", ("overlap_comm=true", "reduce_bucket_size=40000")),
    "zero2, not contiguous": (2, DEEPSPEED, "zero2", ("contiguous_gradients=false", "reduce_bucket_size=40000")),
    "zero2, all-reduced": (2, DEEPSPEED, "zero2", ("reduce_scatter=false",)),
    "zero3, sizes": (
        2,
        DEEPSPEED,
        "zero3",
        (
            *("reduce_bucket_size=2000000", "stage3_max_reuse_distance=0", "stage3_prefetch_bucket_size=1000000"),
            *("stage3_param_persistence_threshold=20000", "sub_group_size=10000"),
        ),
    ),
    "zero3, few kept whole": (
        2,
        DEEPSPEED,
        "zero3",
        ("stage3_param_persistence_threshold=100000", "stage3_model_persistence_threshold=40000"),
    ),
    "zero3, hpZ": (4, DEEPSPEED, "zero3", ("zero_hpz_partition_size=2",)),
    "zero3, gradients in bfloat16": (2, DEEPSPEED, "zero3", ("grad_accum_dtype=bfloat16",)),
}
MOVING_OFTEN = {"fsdp, gathered from fewer", "zero2, overlapped"}
# Each of these cases is covered by cases that run with every change. Other cases combine its keys with its kind of
# layout and have its layout; if it crosses kinds of layouts, other cases have each kind alone.
NIGHTLY = {
    *("single autocast, recompute", "single fp32, routed experts", "single bf16, loss in slices", "single fp8"),
    *("ddp fp32, tied", "ddp autocast, accumulation", "ddp bf16, adapters", "ddp autocast, 8-bit states, tied"),
    *("ddp fp32, adapters over 4 bits, recompute", "ddp fp32, muon, routed experts"),
    *("ddp fp32, adamw in the backward, tied", "fsdp fp32", "fsdp bf16, adapters, recompute", "fsdp fp32, lomo"),
    *("fsdp bf16, adapters over 4 bits", "fsdp bf16, averaged weights", "fsdp fp32, mezo, kept gathered"),
    *("fsdp bf16, uneven, recompute", "fsdp bf16, adamw in the backward, uneven", "hsdp bf16, accumulation"),
    *("expert bf16", "tensor fp32", "tensor bf16, adapters", "tensor, key-value heads copied"),
    *("tensor sequence, recompute", "tensor sequence fp32, adapters, copied"),
    *("tensor_fsdp", "tensor_fsdp bf16, mezo", "tensor_fsdp bf16, adapters, tied", "tensor_fsdp bf16, muon, tied"),
    *("tensor_fsdp fp32, 8-bit states", "tensor_fsdp bf16, adapters over 4 bits", "tensor_data"),
    *("pipeline zero bubble in a V, tied", "pipeline bf16, adapters, tied", "pipeline_data looped", "pipeline_fsdp"),
    *("pipeline_fsdp fp32, adapters over 4 bits", "context gather", "context x pipeline x tensor"),
    *("3d sequence", "3d_zero1, recompute", "zero1 bf16", "zero1 fp32", "zero1 bf16, adapters"),
    *("zero1 bf16, offload", "zero2 fp32", "zero2 fp16", "zero2 fp32, adapters", "zero2 bf16, offload"),
    *("zero3 bf16", "zero3 bf16, adapters, recompute"),
    *("zero2_tensor bf16, adapters", "zero2_tensor fp32, tied, recompute"),
}
# Overrides that only nightly cases have. Other schedules cover zero bubbles, V placement, several stages on a rank, and
# forwards before backwards.
CROSSED = {
    *("parallel=3d", "parallel=3d_zero1", "parallel=expert", "parallel=zero2_tensor", "parallel=pipeline_data"),
    *("parallel=tensor_data", "parallel=tensor_fsdp", "parallel=pipeline_fsdp"),
    *("parallel.pipeline.schedule=looped_bfs", "parallel.pipeline.schedule=zbv_zero_bubble"),
    *("parallel.tp=2", "parallel.tp=4", "parallel.pp=2", "parallel.context_method=gather"),
    *("tuning.double_quantization=false", "model.config.intermediate_size=512", "tuning.dropout=0.1"),
    "data.seq_len=256",
}


def measure_at_rest(overrides: list[str], limits: list[float]) -> list[Measured]:
    """Returns each rank's minimum over one to four measurements. It measures again while a rank is above its limit.

    limits: upper limit of the peak in bytes, one per rank.

    A gloo thread frees the buffers of a collective when it next gets a core, which may be after the step's peak. The
    peak of a rank then randomly includes a few extra buffers, but never too few. So the minimum is the measurement, and
    a prediction that is too low always fails.
    """
    least: list[Measured] = []
    for _ in range(4):
        again = run_ranks(len(limits), measure, overrides)
        least = [
            Measured(peak=min(a.peak, b.peak), after=min(a.after, b.after))
            for a, b in zip(least or again, again, strict=True)
        ]
        if all(rank.peak <= limit for rank, limit in zip(least, limits, strict=True)):
            break
    return least


def test_every_kind_of_layout_and_key_is_measured_with_every_change() -> None:
    often = {word for name, (_, _, words) in CASES.items() if name not in NIGHTLY for word in words}
    missing = {word for _, _, words in CASES.values() for word in words} - often
    assert CASES.keys() > NIGHTLY and missing == CROSSED


@pytest.mark.parametrize("name", rows(zip(CASES), lambda name: name not in NIGHTLY))
def test_predicted_peak_is_the_measured_peak(name: str, tmp_path: Path) -> None:
    ranks, tolerance, words = CASES[name]
    compare(ranks, tolerance, words, tmp_path)


@pytest.mark.parametrize("name", rows(zip(MOVING), lambda name: name in MOVING_OFTEN))
def test_settings_of_an_engine_move_the_prediction_as_they_move_the_peak(name: str, tmp_path: Path) -> None:
    ranks, tolerance, layout, own = MOVING[name]
    usual = ["data=synthetic", f"parallel={layout}", *LLAMA, *SHORT, *BF16]
    section = "deepspeed" if layout.startswith("zero") else "fsdp"
    words = [*usual, *(f"parallel.{section}.{key}" for key in own)]
    compare(ranks, tolerance, words, tmp_path)
    before, after = (
        estimate(config, make_plan(config, Machine(world_size=ranks, local_world_size=ranks))).busiest
        for config in map(load_config, (usual, words))
    )
    assert after.peak_allocated_bytes != before.peak_allocated_bytes


def compare(ranks: int, tolerance: float, words: list[str], tmp_path: Path) -> None:
    overrides = ["data=synthetic", *words, f"data.cache_dir={tmp_path}"]
    config = load_config(overrides)
    plan = make_plan(config, Machine(world_size=ranks, local_world_size=ranks))
    predicted = estimate(config, plan)
    kinds = [predicted.of_rank(plan, rank) for rank in range(ranks)]
    measured = measure_at_rest(overrides, [kind.peak_allocated_bytes * (1 + tolerance) for kind in kinds])
    for kind in predicted.ranks:
        found = [measured[rank] for rank in range(ranks) if kinds[rank] is kind]
        assert kind.peak_allocated_bytes == pytest.approx(max(rank.peak for rank in found), rel=tolerance), kind.kind
        # Parameters, gradient buckets and states remain between steps. Their prediction is exact, including padding.
        assert abs(kind.between_steps_bytes - max(rank.after for rank in found)) < SCALARS, kind.kind
        assert sum(kind.components.values()) == kind.peak_allocated_bytes
    assert sum(kind.count for kind in predicted.ranks) == ranks
