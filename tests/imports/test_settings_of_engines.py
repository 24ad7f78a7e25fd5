"""Engine settings without a key of their own: some pass through, and the others are left out and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.foreign import Fate
from configs.imports.combine import import_files
from configs.imports.deepspeed import follow
from configs.imports.write import as_config, experiment
from launch.estimate import main as memory_estimate
from launch.translated import translate
from tests.support.imported import FSDP, ZERO2, experiment_of, names, written
from trainer.engine.deepspeed.settings import problems
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

NVME = {"device": "nvme", "nvme_path": "/nvme"}
ZERO = "parallel.deepspeed."
OWN: dict[str, tuple[dict[str, Any], dict[str, Any], set[str], set[str]]] = {
    "stage 2": (
        {
            "zero_optimization": {
                **{"stage": 2, "overlap_comm": True, "allgather_bucket_size": 2e8, "reduce_scatter": False},
                **{"contiguous_gradients": True, "stage3_max_live_parameters": 1e9, "mics_shard_size": 4},
            },
            "aio": {"block_size": 262144},
            "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        },
        {
            f"{ZERO}comms_logger": True,
            f"{ZERO}overlap_comm": True,
            f"{ZERO}allgather_bucket_size": 200_000_000,
            f"{ZERO}reduce_scatter": False,
        },
        {"zero_optimization.contiguous_gradients", "zero_optimization.stage3_max_live_parameters", "aio.block_size"}
        | {"comms_logger.prof_ops"},
        {"zero_optimization.mics_shard_size"},
    ),
    "stage 3": (
        {
            "zero_optimization": {
                **{"stage": 3, "overlap_comm": False, "stage3_max_live_parameters": 1e9, "allgather_bucket_size": 2e8},
                **{"stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": False},
                **{"zero_hpz_partition_size": 1, "model_persistence_threshold": 1e6, "zero_quantized_weights": True},
            }
        },
        {
            **{f"{ZERO}overlap_comm": False, f"{ZERO}stage3_max_live_parameters": 10**9},
            **{f"{ZERO}stage3_use_all_reduce_for_fetch_params": True},
            f"{ZERO}stage3_model_persistence_threshold": 10**6,
        },
        {f"zero_optimization.{name}" for name in ("stage3_allgather_sequential", "zero_hpz_partition_size")}
        | {"zero_optimization.allgather_bucket_size"},
        {"zero_optimization.zero_quantized_weights"},
    ),
    "stage 1 in bfloat16, which reads none of them": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 2e8}},
        {},
        {"zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size"},
        set(),
    ),
    "on a disk": (
        {
            "zero_optimization": {
                **{"stage": 3, "offload_optimizer": NVME, "offload_param": NVME, "zero_hpz_partition_size": 8},
                **{"reduce_bucket_size": 2e8, "stage3_max_live_parameters": 1e9},
            },
            "aio": {"block_size": 1048576, "queue_depth": 16, "single_submit": False, "use_gds": True},
        },
        {
            f"{ZERO}reduce_bucket_size": 200_000_000,
            **{f"{ZERO}aio.block_size": 2**20, f"{ZERO}aio.queue_depth": 16, f"{ZERO}aio.single_submit": False},
        },
        set(),
        {f"zero_optimization.{name}" for name in ("zero_hpz_partition_size", "stage3_max_live_parameters")}
        | {"aio.use_gds"},
    ),
    "parameters on a disk": (
        {
            "zero_optimization": {
                **{"stage": 3, "offload_param": NVME, "stage3_prefetch_bucket_size": 5e8},
                **{"stage3_param_persistence_threshold": "auto"},
            },
            "data_types": {"grad_accum_dtype": "bf16"},
        },
        {},
        {"zero_optimization.stage3_param_persistence_threshold"},
        {"zero_optimization.stage3_prefetch_bucket_size", "data_types.grad_accum_dtype"},
    ),
    "gathered one by one": (
        {"zero_optimization": {"stage": 3, "stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 5e7}},
        {f"{ZERO}stage3_allgather_sequential": True},
        {"zero_optimization.stage3_prefetch_bucket_size"},
        set(),
    ),
    "an offloaded optimizer": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": False}},
        {},
        {"zero_optimization.contiguous_gradients"},
        set(),
    ),
    "a second bucket": (
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": False}},
        {f"{ZERO}overlap_comm": True},
        set(),
        {"zero_optimization.contiguous_gradients"},
    ),
    "FSDP of version 1": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_forward_prefetch": True, "fsdp_sharding_strategy": 1}},
        {"parallel.fsdp.forward_prefetch": 1},
        set(),
        set(),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_settings_of_an_engine_pass_through(tmp_path: Path, name: str) -> None:
    tree, settings, harmless, lost = OWN[name]
    made = import_files(written(tmp_path, ds_json=tree))
    own = (ZERO, "parallel.fsdp.")
    assert {key: value for key, value in made.settings.items() if key.startswith(own)} == settings
    assert harmless <= names(made, Fate.harmless) and lost <= names(made, Fate.lost)
    assert not names(made, Fate.unknown)
    experiment_of(made, tmp_path)  # the schema accepts this configuration
    follow(made.settings, made.compute)
    assert not [*problems(as_config(made))]  # and so does the plan, also with DeepSpeed's own sizes


def test_stage_1_in_bfloat16_has_no_bucket_whoever_says_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan refuses a bucket size there, so one from a file, from "auto" or from DeepSpeed's default is dropped."""
    monkeypatch.chdir(tmp_path)
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"}
    written(tmp_path, ds_json={"zero_optimization": zero}, args_json={"bf16": True, "deepspeed": "ds.json"})
    written(tmp_path, own_json={"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e8}})
    more = ["model=tiny", "cluster=8xh100", "data.seq_len=32", "estimate.suggest=false"]
    assert memory_estimate(["--from", "ds.json", "--from", "args.json", *more]) == 0
    assert memory_estimate(["--from", "own.json", "precision=bf16", *more]) == 0
    assert "parallel.deepspeed" not in capsys.readouterr().err


PAGED = {"per_device_train_batch_size": 1, "max_steps": 3, "optim": "paged_adamw_32bit"}
LEFT_OUT = {
    "paging next to accelerate's offload": (
        {"args_json": PAGED, "acc_yaml": {**FSDP, "fsdp_config": {"fsdp_offload_params": True}}},
        ("optim", "optimizer.paged", "parallel.offload.parameters=cpu keeps states in host memory for good"),
    ),
    "paging next to accelerate's DeepSpeed": (
        {"args_json": PAGED, "acc_yaml": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}},
        ("optim", "optimizer.paged", "DeepSpeed makes the states of its partitions itself"),
    ),
    "prefetch where nothing is sharded": (
        {
            "acc_yaml": {
                **FSDP,
                "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD", "fsdp_forward_prefetch": True},
            }
        },
        ("fsdp_config.fsdp_forward_prefetch", "parallel.fsdp.forward_prefetch", "nothing is sharded here"),
    ),
    "a bucket of an odd size": (
        {"ds_json": {"zero_optimization": {"stage": 2, "allgather_bucket_size": 5_000_001}}},
        (
            "zero_optimization.allgather_bucket_size",
            "parallel.deepspeed.allgather_bucket_size",
            "DeepSpeed divides it by two",
        ),
    ),
    "a disk that nothing goes to": (
        {
            "acc_yaml": {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 3, "offload_optimizer_nvme_path": "/nvme"},
            }
        },
        (
            "deepspeed_config.offload_optimizer_nvme_path",
            "parallel.offload.nvme_path",
            "nothing is offloaded to nvme",
        ),
    ),
    "packing of a stream, which is packed anyhow": (
        {"args_json": {**PAGED, "optim": "adamw_torch", "dataset_name": "x/y", "packing": True}},
        ("packing", "data.packing", "is for data=chat, this is data=hub"),
    ),
    "compilation under DeepSpeed": (
        {"args_json": {**PAGED, "optim": "adamw_torch", "torch_compile": True}, "ds_json": ZERO2},
        ("torch_compile", "train.compile", "engine torch only"),
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_run_would_not_read_is_left_out_and_said(case: str, tmp_path: Path) -> None:
    files, (name, key, rule) = LEFT_OUT[case]
    made = translate(written(tmp_path, **files), [], config_dir=None)
    assert key not in made.settings
    (field,) = (each for each in made.fields if each.name == name)
    assert rule in field.why
    assert key not in experiment_of(made, tmp_path)
    make_plan(as_config(made), Machine(gpus=2))
    assert rule in experiment(made, "command") or field.fate is Fate.translated


def test_paging_stays_where_a_gpu_reads_it(tmp_path: Path) -> None:
    made = translate(written(tmp_path, args_json=PAGED), [], config_dir=None)
    assert made.settings["optimizer.paged"] is True
