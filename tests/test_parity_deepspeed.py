"""Every ZeRO layout equals one process: loss and gradient norm at each step, validation loss, parameters at the end.

DeepSpeed has no float64, so the tests use float32 with a tolerance of 1e-5. Model and optimizer must not magnify
rounding: Adam divides by the root of a tiny second moment, so eps is larger. All rows have ragged valid tokens,
gradient accumulation, active clipping and a vocabulary that the ranks do not divide evenly. gpt2 and qwen3 have a tied
embedding.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

import configs
from configs.zero_settings import READ
from tests.support.cases import Trained, train
from tests.support.deepspeed_cases import WIDE, build_or_skip, train_validating
from tests.support.harness import run_ranks
from tests.support.moe_cases import EXPERTS
from tests.support.parity import MODELS, ROWS, Row, distance, measure, reference, words
from tests.support.selection import rows

FLOAT32 = 1e-5
STEPS = 4
STABLE = ("train.gradient_accumulation_steps=2", "optimizer.lr=1e-3", "optimizer.eps=1e-5")

# preset -> (processes, further keys, models tested with every change); the other models are nightly.
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "zero1": (2, (), ("gpt2",)),
    "zero2": (2, (), ("llama",)),
    "zero3": (2, (), ("llama",)),
    "zero1_offload": (2, (), ("qwen3",)),
    "zero2_offload": (2, (), ("gpt2",)),
    "zero3_offload": (2, (), ("gpt2",)),
    "zero1_tensor": (4, (), ("qwen3",)),
    "zero2_tensor": (4, ("parallel.sequence_parallel=true",), ("gpt2",)),
}
VARIANTS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "zero1 alone": ("zero1", 1, ()),
    "zero1 on 4": ("zero1", 4, ("train.gradient_accumulation_steps=1",)),
    "zero2 on 4": ("zero2", 4, ("train.gradient_accumulation_steps=1",)),
    "zero2, selective recompute": ("zero2", 2, ("train.activation_checkpointing=selective",)),
    "zero1, tensor parallel alone": ("zero1_tensor", 2, ("parallel.dp_shard=1",)),
    "zero1, key-value heads fewer than tp": ("zero1_tensor", 4, ("parallel.tp=4", "parallel.sequence_parallel=true")),
    "zero2, tensor parallel, offloaded": ("zero2_tensor", 4, ("parallel.offload.optimizer=cpu",)),
    "zero3 on 3": ("zero3", 3, ("train.gradient_accumulation_steps=1", "train.global_batch_size=9")),
    "zero3 on 4, offloaded": ("zero3_offload", 4, ("train.gradient_accumulation_steps=1",)),
    "zero3, optimizer offloaded": ("zero3_offload", 2, ("parallel.offload.parameters=none",)),
    "zero3, parameters offloaded": ("zero3_offload", 2, ("parallel.offload.optimizer=none",)),
}
REPEATED = {"zero1 on 4", "zero2 on 4", "zero3 on 4, offloaded", "zero2, selective recompute"}
REPEATED |= {"zero2, tensor parallel, offloaded", "zero3, optimizer offloaded", "zero1, tensor parallel alone"}
OPTIONS = ("optimizer.eps=1e-8", "optimizer.options.eps=1e-5")
KEYS: dict[str, tuple[str, ...]] = {
    "no accumulation": ("train.gradient_accumulation_steps=1",),
    "four micro-batches": ("train.gradient_accumulation_steps=4",),
    "full recompute": ("train.activation_checkpointing=full",),
    "chunked loss": ("train.chunked_loss=true",),
    "smoothed labels and noise": ("train.label_smoothing=0.2", "train.neftune_alpha=1"),
    "balanced experts": (*EXPERTS, "moe=global_batch", "moe.coefficient=0.5", "moe.z_loss=0.01"),
    "sgd": ("optimizer=sgd", "optimizer.lr=0.5", "optimizer.eps=1e-8"),
    "no clipping": ("train.clip_grad_norm=0",),
    "groups by role": ("optimizer.groups.embedding.lr=3e-3", "optimizer.groups.vector.weight_decay=0.2"),
    "any optimizer": ("optimizer=custom", "optimizer.target=torch.optim.Adamax", *OPTIONS),
}
OWN = "parallel.deepspeed."
SETTINGS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "zero1, overlapped": ("zero1", 2, ("overlap_comm=true", "reduce_bucket_size=40000")),
    "zero2, overlapped": ("zero2", 2, ("overlap_comm=true", "reduce_bucket_size=40000", "allgather_bucket_size=1000")),
    "zero2, not contiguous": ("zero2", 2, ("contiguous_gradients=false", "reduce_bucket_size=40000")),
    "zero2, all-reduced": ("zero2", 2, ("reduce_scatter=false",)),
    "zero3, one by one": ("zero3", 2, ("stage3_allgather_sequential=true", "overlap_comm=false")),
    "zero3, all-reduced": ("zero3", 2, ("stage3_use_all_reduce_for_fetch_params=true", "reduce_scatter=false")),
    "zero3, bounded": ("zero3", 2, ("stage3_max_live_parameters=0", "stage3_model_persistence_threshold=100")),
    "zero3, hpZ": ("zero3", 4, ("zero_hpz_partition_size=2", "stage3_max_reuse_distance=0")),
}
"""DeepSpeed's own settings: training is equal with and without each of them. Every setting has a row, except the sizes
in SIZES_TRIED, which all rows have."""
SIZES_TRIED = {"sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"}
# (layout, key) pairs tested with every change: zero2 partitions gradients, which affects accumulation; zero3_offload
# also partitions and offloads parameters. Every key has a row.
MEETS = {
    *(("zero2", "four micro-batches"), ("zero2", "full recompute"), ("zero2", "chunked loss")),
    *(("zero3_offload", "balanced experts"), ("zero2", "any optimizer"), ("zero2", "no clipping")),
    *(("zero2", "groups by role"), ("zero2", "smoothed labels and noise"), ("zero2", "no accumulation")),
    ("zero3_offload", "sgd"),
}
ON_DISK: dict[str, tuple[str, ...]] = {
    "optimizer and parameters": (),
    "optimizer": ("parallel.offload.parameters=none",),
    "parameters, full recompute": ("parallel.offload.optimizer=cpu", "train.activation_checkpointing=full"),
    "frozen parameters and adapters": ("tuning=lora", "tuning.rank=64"),
}


def test_every_zero_layout_has_a_row() -> None:
    files = {file.stem for file in (Path(configs.__file__).parent / "parallel").glob("zero*.yaml")}
    assert files - {"zero3_nvme"} == LAYOUTS.keys()
    assert all(models for _, _, models in LAYOUTS.values()), "a layout has nightly rows only"
    assert {key for _, key in MEETS} == KEYS.keys()
    tried = {key.partition("=")[0] for _, _, keys in SETTINGS.values() for key in keys}
    assert tried == READ.keys() - SIZES_TRIED


@pytest.mark.parametrize(
    ("layout", "model"), rows(product(LAYOUTS, MODELS), lambda layout, model: model in LAYOUTS[layout][2])
)
def test_layout_equals_single_process(layout: str, model: str) -> None:
    processes, keys, _ = LAYOUTS[layout]
    found = measure([layout, *keys], processes, model=model, precision="fp32", steps=STEPS, extra=STABLE)
    assert found.largest <= FLOAT32, found


@pytest.mark.parametrize("variant", rows(zip(VARIANTS), lambda variant: variant not in REPEATED))
def test_variant_equals_single_process(variant: str) -> None:
    layout, processes, keys = VARIANTS[variant]
    shared = tuple(key for key in keys if key.startswith("train."))
    own = [key for key in keys if key not in shared]
    found = measure([layout, *own], processes, model="llama", precision="fp32", steps=STEPS, extra=(*STABLE, *shared))
    assert found.largest <= FLOAT32, found


@pytest.mark.parametrize("name", rows(zip(SETTINGS), lambda name: name == "zero3, hpZ"))
def test_setting_of_deepspeed_equals_single_process(name: str) -> None:
    layout, processes, keys = SETTINGS[name]
    shared = STABLE if processes == 2 else (*STABLE, "train.gradient_accumulation_steps=1")
    own = [f"{OWN}{key}" for key in keys]
    found = measure([layout, *own], processes, model="llama", precision="fp32", steps=STEPS, extra=shared)
    assert found.largest <= FLOAT32, found


@pytest.mark.parametrize(("layout", "keys"), rows(product(("zero2", "zero3_offload"), KEYS), lambda *row: row in MEETS))
def test_option_equals_single_process(layout: str, keys: str) -> None:
    found = measure([layout], 2, model="llama", precision="fp32", steps=5, extra=(*STABLE, *KEYS[keys]))
    assert found.largest <= FLOAT32, found


@pytest.mark.timeout(1200)
def test_deepspeeds_own_adam_equals_torchs() -> None:
    keys = ("optimizer.implementation=deepspeed_cpu",)
    build_or_skip([*words("llama", "zero2_offload", "fp32", STEPS), *keys])
    expected = reference("llama", "fp32", STEPS, *STABLE)
    found = run_ranks(2, train, words("llama", "zero2_offload", "fp32", STEPS, *STABLE, *keys))[0]
    assert distance(found, expected).largest <= FLOAT32


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("what", rows(zip(ON_DISK), lambda what: what == "optimizer and parameters"))
def test_nvme_equals_single_process(what: str, tmp_path: Path) -> None:
    """The run has validation passes in between. They disturb the order in which DeepSpeed expects the parameters."""
    keys = (*ON_DISK[what], f"parallel.offload.nvme_path={tmp_path}")
    run = words("llama", "zero3_nvme", "fp32", 5, *WIDE, *keys)
    build_or_skip(run)
    adapters = ON_DISK[what] if "tuning=lora" in keys else ()
    expected = reference("llama", "fp32", 5, *WIDE, *adapters)
    results: list[tuple[Trained, dict[str, int], list[str]]] = run_ranks(2, train_validating, run)
    found = distance(results[0][0], expected)
    # test_tuning has the same limit: while B is small, Adam divides small gradients by small moments.
    assert found.largest <= (1e-4 if adapters else FLOAT32), found
    ROWS.append(Row("zero3_nvme", " ".join([*ON_DISK[what], *WIDE]), 2, "llama", "fp32", found))
    files = results[0][1]
    for kind in ("optimizer", "float32params"):
        for rank in (0, 1):
            swapped = [size for name, size in files.items() if f"/zero_stage_3/{kind}/rank{rank}/" in name]
            wanted = what != "optimizer" if kind == "float32params" else what != "parameters, full recompute"
            assert bool(swapped) == wanted, (kind, rank, files)
            assert min(swapped, default=2**20) >= 2**20, files
    assert results[0][2] == [], "swap files of a finished run must not stay"
