"""Which settings each of DeepSpeed's optimizers reads.

The plan refuses settings that this run would not read (`trainer.engine.deepspeed.settings`); an import drops them
(`configs.imports.deepspeed`).
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.choices import DType, OffloadDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """Which optimizers read a setting. disk: whether it is allowed when states or parameters are on a disk, whose
    buffer sizes are computed from the model. plain: whether the optimizer of stage 1 in bfloat16 reads it too."""

    stages: tuple[int, ...]
    disk: bool = False
    plain: bool = False


READ = {
    "reduce_bucket_size": Read(stages=(1, 2, 3), disk=True),
    "allgather_bucket_size": Read(stages=(1, 2), plain=True),
    "overlap_comm": Read(stages=(1, 2, 3), disk=True),
    "contiguous_gradients": Read(stages=(1, 2)),
    "reduce_scatter": Read(stages=(1, 2, 3), disk=True),
    "sub_group_size": Read(stages=(3,)),
    "stage3_prefetch_bucket_size": Read(stages=(3,), disk=True),
    "stage3_param_persistence_threshold": Read(stages=(3,)),
    "stage3_model_persistence_threshold": Read(stages=(3,)),
    "stage3_max_live_parameters": Read(stages=(3,)),
    "stage3_max_reuse_distance": Read(stages=(3,)),
    "stage3_use_all_reduce_for_fetch_params": Read(stages=(3,)),
    "stage3_allgather_sequential": Read(stages=(3,)),
    "zero_hpz_partition_size": Read(stages=(3,)),
}


def is_plain(*, stage: int, compute: str, offload: str) -> bool:
    """Whether DeepSpeed uses its plain optimizer of stage 1 in bfloat16. compute: `precision.param_dtype`. offload:
    `parallel.offload.optimizer`."""
    return stage == 1 and compute == DType.bfloat16 and offload == OffloadDevice.none
