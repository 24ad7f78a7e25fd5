"""DeepSpeed's JSON has the expected settings for known plans and leaves no setting that matters to a default."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import configs
from configs.errors import CookbookError
from configs.load import load_config
from trainer.engine.deepspeed.config import ModelSize, deepspeed_config
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

TINY = ModelSize(parameters=900_001, trained=900_001, largest=33_280, largest_vector=128, widest_module=2)
LLAMA_8B = ModelSize(
    parameters=8_030_261_248, trained=8_030_261_248, largest=525_336_576, largest_vector=4096, widest_module=1
)
LAYOUTS = sorted(file.stem for file in (Path(configs.__file__).parent / "parallel").glob("zero*.yaml"))


def settings(layout: str, *overrides: str, size: ModelSize = LLAMA_8B, gpus: int = 8) -> dict[str, Any]:
    words = [f"parallel={layout}", "train.global_batch_size=48", "train.micro_batch_size=2", *overrides]
    config = load_config(words)
    return deepspeed_config(config, make_plan(config, Machine(gpus=gpus)), size, swap_folder="/nvme/swap-1")


def test_zero2_in_bfloat16() -> None:
    assert settings("zero2", "precision=bf16", "train.clip_grad_norm=0") == {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "allgather_partitions": True,
            "overlap_comm": False,
            "reduce_bucket_size": 500_000_000,
            "allgather_bucket_size": 500_000_000,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": True, "check_grad_overflow": True},
    }


def test_settings_of_deepspeed_pass_through() -> None:
    given = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0, "sub_group_size": 500, "overlap_comm": False}
    given |= {"stage3_max_live_parameters": 9, "zero_hpz_partition_size": 4, "reduce_scatter": False}
    zero = settings("zero3", *(f"parallel.deepspeed.{name}={value}" for name, value in given.items()))[
        "zero_optimization"
    ]
    before = settings("zero3")["zero_optimization"]
    assert zero == {**before, **given} != before
    counted = settings("zero1", "parallel.deepspeed.comms_logger=true")["comms_logger"]
    assert counted == {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    words = ["parallel.deepspeed.stage3_allgather_sequential=true", "parallel.deepspeed.stage3_prefetch_bucket_size=9"]
    compact = settings("zero3", "precision=bf16", "parallel.deepspeed.grad_accum_dtype=bfloat16")
    assert compact["data_types"] == {"grad_accum_dtype": "bf16"}
    with pytest.raises(CookbookError, match="gathers nothing ahead; leave one of the two out"):
        settings("zero3", *words)
    disk = ["parallel.offload.nvme_path=/nvme", "parallel.deepspeed.aio.queue_depth=32"]
    disk += ["parallel.deepspeed.aio.block_size=4194304", "parallel.deepspeed.aio.intra_op_parallelism=3"]
    made, usual = settings("zero3_nvme", *disk, size=TINY), settings("zero3_nvme", *disk[:1], size=TINY)
    assert made["aio"] == usual["aio"] | {"queue_depth": 32, "block_size": 2**22, "intra_op_parallelism": 3}
    # Whatever is smaller than a block stays in memory, so each group of states has the size of four blocks.
    assert made["zero_optimization"]["sub_group_size"] == 4 * usual["zero_optimization"]["sub_group_size"] == 2**22
    assert made["zero_optimization"]["offload_param"]["buffer_size"] * 4 % (3 * 1024) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("parallel=fsdp parallel.deepspeed.sub_group_size=9", "sub_group_size=9: needs parallel.engine=deepspeed"),
        ("parallel=zero2 parallel.deepspeed.sub_group_size=9", "only stage 3 reads it, this is stage 2"),
        (
            "parallel=zero3_nvme parallel.offload.nvme_path=/x parallel.deepspeed.stage3_max_reuse_distance=9",
            "buffers between memory and disk depend on it",
        ),
        ("parallel=zero3 parallel.deepspeed.reduce_bucket_size=0", "reduce_bucket_size=0: must be 1 or more"),
        (
            "parallel=zero1 precision=bf16 parallel.deepspeed.reduce_bucket_size=9",
            "has an optimizer that does not read",
        ),
        ("parallel=zero1 parallel.deepspeed.stage3_allgather_sequential=true", "=true: only stage 3 reads it"),
        ("parallel=zero3 parallel.deepspeed.contiguous_gradients=false", "stage 3 does not read it, stages 1 and 2 do"),
        ("parallel=zero2 parallel.deepspeed.allgather_bucket_size=9", "=9: DeepSpeed divides it by two; use an even"),
        (
            "parallel=zero2_offload parallel.deepspeed.contiguous_gradients=false",
            "always copied into a buffer; use true",
        ),
        (
            "parallel=zero2 parallel.deepspeed.contiguous_gradients=false parallel.deepspeed.overlap_comm=true",
            "parallel.deepspeed.overlap_comm=true fills a second buffer",
        ),
        (
            "parallel=zero3 parallel.deepspeed.zero_hpz_partition_size=3",
            "8 data-parallel ranks are not divisible by it",
        ),
        ("parallel=zero3_offload parallel.deepspeed.zero_hpz_partition_size=4", "takes from the GPU what the second"),
        (
            "parallel=zero2 precision=bf16 parallel.deepspeed.grad_accum_dtype=bfloat16",
            "choose another optimizer by it",
        ),
        ("parallel=fsdp parallel.deepspeed.grad_accum_dtype=bfloat16", "=bfloat16: needs parallel.engine=deepspeed"),
        ("parallel=zero3 parallel.deepspeed.grad_accum_dtype=float16", "use float32"),
        (
            "parallel=zero3_nvme parallel.offload.nvme_path=/x precision=bf16"
            " parallel.deepspeed.grad_accum_dtype=bfloat16",
            "buffers between memory and disk depend on it",
        ),
        ("parallel=zero3 parallel.deepspeed.aio.queue_depth=4", "queue_depth=4: nothing is offloaded to nvme"),
        ("parallel=fsdp parallel.deepspeed.comms_logger=true", "comms_logger=true: needs parallel.engine=deepspeed"),
        ("parallel=zero2 parallel.deepspeed.round_robin_gradients=true", "takes one parameter for another"),
        (
            "parallel=zero3 parallel.deepspeed.zero_quantized_weights=true",
            "there is none for it: parameters are gathered",
        ),
        ("parallel=zero3 parallel.fsdp.forward_prefetch=1", "FSDP2 is of engine torch; leave it out"),
        ("parallel=ddp parallel.fsdp.forward_prefetch=1", "=1: nothing is sharded here; leave it out, or use"),
        ("parallel=fsdp parallel.fsdp.reshard_size=3", "sharded over 8 ranks, which are not divisible by it"),
        ("parallel=tensor_fsdp parallel.fsdp.reshard_size=2", "no smaller group for what parallel.tp=2 has divided"),
        (
            "parallel=fsdp parallel.fsdp.reshard_size=2 parallel.reshard_after_forward=false",
            "parallel.reshard_after_forward=false keeps parameters whole",
        ),
        ("parallel=pipeline_fsdp parallel.fsdp.backward_prefetch=2", "parallel.pp=2 keeps the parameters of a stage"),
        (
            "parallel=expert_fsdp parallel.fsdp.backward_prefetch=2",
            "experts that parallel.ep divides are gathered apart",
        ),
        ("parallel=fsdp parallel.fsdp.transformer_layer_cls_to_wrap=X", "each decoder layer is one unit, whatever"),
    ],
)
def test_settings_of_deepspeed_that_cannot_be_followed_are_refused(words: str, said: str) -> None:
    with pytest.raises(CookbookError) as refused:
        make_plan(load_config(words.split()), Machine(gpus=8))
    assert any(said in problem for problem in refused.value.problems), refused.value.problems


def test_large_model_gets_deepspeeds_own_sizes() -> None:
    zero = settings("zero3_nvme", "precision=bf16", "parallel.offload.nvme_path=/nvme")["zero_optimization"]
    assert zero == {
        "stage": 3,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "overlap_comm": True,
        "reduce_bucket_size": 500_000_000,
        "allgather_bucket_size": 500_000_000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 4096,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 0,
        "sub_group_size": 100_000_000,
        "stage3_gather_16bit_weights_on_model_save": False,
        "offload_optimizer": {"device": "nvme", "pin_memory": True, "nvme_path": "/nvme/swap-1", "buffer_count": 4},
        "offload_param": {
            "device": "nvme",
            "pin_memory": True,
            "nvme_path": "/nvme/swap-1",
            "buffer_size": 65_667_072 + 2**19 - 65_667_072 % 2**19,
            "buffer_count": 5,
            "max_in_cpu": 0,
        },
    }
    in_memory = settings("zero3", "precision=bf16")["zero_optimization"]
    assert in_memory["stage3_prefetch_bucket_size"] == 50_000_000
    assert in_memory["stage3_max_reuse_distance"] == 1_000_000_000


def test_small_model_is_partitioned_too() -> None:
    zero = settings("zero3", size=TINY)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] < TINY.largest
    assert zero["stage3_max_live_parameters"] < TINY.parameters
    assert zero["reduce_bucket_size"] == 900_002, "DeepSpeed wants an even number"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [TINY, LLAMA_8B, replace(TINY, largest_vector=0)])
def test_every_layout_makes_valid_json(layout: str, size: ModelSize) -> None:
    path = ["parallel.offload.nvme_path=/nvme"] if layout == "zero3_nvme" else []
    made = settings(layout, *path, size=size)
    assert json.loads(json.dumps(made)) == made
    sizes = {key: value for key, value in made["zero_optimization"].items() if key.endswith(("size", "threshold"))}
    assert all(isinstance(value, int) and value >= 0 for value in sizes.values()), sizes
    assert ("aio" in made) == (layout == "zero3_nvme")


def test_layouts_were_found() -> None:
    assert len(LAYOUTS) == 9


def test_float16_starts_at_the_configured_scale() -> None:
    assert settings("zero1", "precision=fp16")["fp16"] == {"enabled": True, "loss_scale": 65536.0}
    assert settings("zero1", "precision=fp16", "precision.loss_scale=128")["fp16"]["loss_scale"] == 128.0
    assert "fp16" not in settings("zero1")


def test_memory_is_pinned_on_gpu_machines_unless_refused() -> None:
    pinned = settings("zero2_offload")["zero_optimization"]["offload_optimizer"]
    refused = settings("zero2_offload", "parallel.offload.pin_memory=false")["zero_optimization"]["offload_optimizer"]
    on_cpu = settings("zero2_offload", "cluster.gpus_per_node=2", "train.global_batch_size=8", gpus=0)
    assert pinned == {"device": "cpu", "pin_memory": True}
    assert refused == on_cpu["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_reduce_dtype_and_optimizer_reach_deepspeed() -> None:
    made = settings("zero2", "precision=bf16", "precision.reduce_dtype=bfloat16", "optimizer=sgd")
    assert made["communication_data_type"] == "bf16"
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["zero_allow_untested_optimizer"] is True


def test_needs_neither_torch_nor_deepspeed() -> None:
    """An estimate reads these settings and must answer at once."""
    code = "import sys, trainer.engine.deepspeed.config; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
