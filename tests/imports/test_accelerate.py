"""accelerate's files by kind of run: the resulting settings, and the fields that are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.foreign import Fate
from configs.imports.combine import import_files
from tests.support.imported import experiment_of, names, written

ACCELERATE: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "ddp": (
        {
            "distributed_type": "MULTI_GPU",
            "num_machines": 2,
            "num_processes": 16,
            "mixed_precision": "fp16",
            "gpu_ids": "all",
        },
        {
            "parallel.preset": "ddp",
            "parallel.dp_replicate": None,
            "cluster.nodes": 2,
            "cluster.gpus_per_node": 8,
            "precision.preset": "fp16",
            "precision.param_dtype": "float16",
        },
        set(),
    ),
    "fsdp1": (
        {
            "distributed_type": "FSDP",
            "downcast_bf16": "no",
            "num_processes": 4,
            "fsdp_config": {
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "fsdp_backward_prefetch": "BACKWARD_PRE",
                "fsdp_sharding_strategy": 2,
                "fsdp_offload_params": True,
                "fsdp_ignored_modules": "lm_head",
            },
        },
        {
            "parallel.preset": "fsdp_offload",
            "parallel.dp_shard": None,
            "parallel.reshard_after_forward": False,
            "parallel.offload.optimizer": "cpu",
            "parallel.offload.parameters": "cpu",
            "cluster.gpus_per_node": 4,
        },
        {"fsdp_config.fsdp_ignored_modules"},
    ),
    "hybrid": (
        {
            "distributed_type": "FSDP",
            "num_machines": 2,
            "num_processes": 8,
            "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"},
        },
        {
            "parallel.preset": "hsdp",
            "parallel.dp_replicate": None,
            "parallel.dp_shard": 4,
            "parallel.reshard_after_forward": True,
            "cluster.nodes": 2,
            "cluster.gpus_per_node": 4,
        },
        set(),
    ),
    "fsdp2": (
        {
            "distributed_type": "FSDP",
            "mixed_precision": "bf16",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_reshard_after_forward": True,
                "fsdp_activation_checkpointing": True,
                "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            },
        },
        {
            "parallel.preset": "fsdp",
            "parallel.dp_shard": None,
            "parallel.reshard_after_forward": True,
            "train.activation_checkpointing": "full",
            "precision.preset": "bf16",
            "precision.param_dtype": "bfloat16",
        },
        set(),
    ),
    "deepspeed": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "zero_stage": 3,
                "offload_param_device": "cpu",
                "offload_optimizer_device": "cpu",
                "gradient_accumulation_steps": 2,
                "zero3_init_flag": True,
            },
        },
        {
            "parallel.preset": "zero3_offload",
            "parallel.engine": "deepspeed",
            "parallel.zero_stage": 3,
            "parallel.dp_shard": None,
            "parallel.offload.optimizer": "cpu",
            "parallel.offload.parameters": "cpu",
            "train.gradient_accumulation_steps": 2,
        },
        set(),
    ),
    "degrees": (
        {
            "distributed_type": "FSDP",
            "num_processes": 8,
            "parallelism_config": {
                "parallelism_config_dp_shard_size": 2,
                "parallelism_config_tp_size": 2,
                "parallelism_config_cp_size": 2,
                "parallelism_config_cp_comm_strategy": "alltoall",
            },
        },
        {"parallel.dp_shard": 2, "parallel.tp": 2, "parallel.cp": 2, "cluster.gpus_per_node": 8},
        {"parallelism_config.parallelism_config_cp_comm_strategy"},
    ),
    "megatron": (
        {
            "distributed_type": "MEGATRON_LM",
            "num_processes": 8,
            "fsdp_config": {},
            "megatron_lm_config": {
                "megatron_lm_tp_degree": 2,
                "megatron_lm_pp_degree": 2,
                "megatron_lm_num_micro_batches": 4,
                "megatron_lm_sequence_parallelism": True,
                "megatron_lm_recompute_activations": True,
                "megatron_lm_use_distributed_optimizer": False,
                "megatron_lm_eod_mask_loss": True,
            },
        },
        {
            "parallel.tp": 2,
            "parallel.pp": 2,
            "parallel.sequence_parallel": True,
            "parallel.dp_replicate": None,
            "train.gradient_accumulation_steps": 4,
            "train.activation_checkpointing": "selective",
            "cluster.gpus_per_node": 8,
        },
        {"megatron_lm_config.megatron_lm_eod_mask_loss"},
    ),
}


@pytest.mark.parametrize("kind", ACCELERATE)
def test_accelerate(kind: str, tmp_path: Path) -> None:
    tree, wanted, lost = ACCELERATE[kind]
    made = import_files(
        written(tmp_path, accelerate_yaml={"compute_environment": "LOCAL_MACHINE", "machine_rank": 0, **tree})
    )
    found = experiment_of(made, tmp_path)
    if "parallel.preset" not in wanted:
        found.pop("parallel.preset")
    assert found == wanted
    assert names(made, Fate.lost) == lost and not names(made, Fate.unknown)


@pytest.mark.parametrize("how", [{"fsdp_reshard_after_forward": True}, {"fsdp_sharding_strategy": "FULL_SHARD"}])
def test_degrees_of_parallelism_config_stand_beside_a_strategy_of_fsdp(how: dict[str, Any], tmp_path: Path) -> None:
    degrees = {"parallelism_config_dp_shard_size": 2, "parallelism_config_tp_size": 2}
    tree = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": how, "parallelism_config": degrees}
    made = import_files(written(tmp_path, acc_yaml=tree))
    assert (made.settings["parallel.dp_shard"], made.settings["parallel.tp"]) == (2, 2)
    assert made.settings["parallel.reshard_after_forward"] is True
