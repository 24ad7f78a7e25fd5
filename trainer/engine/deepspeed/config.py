"""DeepSpeed's JSON, computed from the plan: a pure function, without torch and without DeepSpeed.

Every default of DeepSpeed that changes the mathematics (its gradient clipping is on unless turned off) or that affects
memory (buckets, buffers and windows of up to 10**9 elements) is set explicitly here. Unset values affect neither. The
memory estimator reads the same dictionary.

    P elements in the model, W ranks            bucket and window sizes, in elements
    reduce_bucket_size, allgather_bucket_size   5 * 10**8, never more than are trained: P, or adapters alone
    stage3_prefetch_bucket_size                 5 * 10**7, never more than the window
    stage3_max_live_parameters, ..._distance    10**9, never more than the window
    window                                      P / 4, at least the largest parameter
    sub_group_size (one step of the optimizer)  10**8, never more than a quarter of what is trained, over W

The caps are DeepSpeed's own defaults, except sub_group_size. The fractions make a small model behave like a large one:
with the bare defaults ZeRO 3 holds any model of less than 10**9 parameters whole on every rank. A size in
`parallel.deepspeed` replaces the computed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, DType, OffloadDevice
from configs.schema import Config
from trainer.axes import SHARD
from trainer.engine.deepspeed.settings import accumulating, given, given_aio
from trainer.plan.plan import Plan

if TYPE_CHECKING:
    from torch import nn

DTYPE_NAMES = {DType.float32: "fp32", DType.bfloat16: "bf16", DType.float16: "fp16"}
# DeepSpeed swaps a tensor only if its share on a rank has at least this many bytes; smaller ones stay in memory.
SWAP_BYTES = 2**20
ALIGNED_BYTES = 1024  # each thread reads and writes multiples of this


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Numbers of elements. parameters: all, tied ones once. trained: the trained ones. largest: the largest parameter
    (usually an embedding). largest_vector: the largest parameter with one dimension (a norm or a bias). widest_module:
    maximum number of parameters of one module (2 with biases)."""

    parameters: int
    trained: int
    largest: int
    largest_vector: int
    widest_module: int


def model_size(model: nn.Module) -> ModelSize:
    """Measure a model, which may be on the meta device but must not be partitioned yet. If tensor parallel has divided
    a parameter, this rank's part counts."""
    everything: list[Any] = list(model.parameters())
    parameters = [p.to_local() if hasattr(p, "to_local") else p for p in everything]
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p, whole in zip(parameters, everything, strict=True) if whole.requires_grad),
        largest=max(p.numel() for p in parameters),
        largest_vector=max((p.numel() for p in parameters if p.ndim < 2), default=0),
        widest_module=max(len(module._parameters) for module in model.modules()),
    )


def deepspeed_config(config: Config, plan: Plan, size: ModelSize, *, swap_folder: str | None = None) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`. swap_folder: this run's own folder below offload.nvme_path."""
    batch = plan.batch
    settings: dict[str, Any] = {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": config.train.clip_grad_norm,
        "zero_optimization": _zero(config, plan, size, swap_folder),
        # torch's optimizers may update offloaded states: correct, no compiler needed, slower than DeepSpeedCPUAdam.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's list of tested optimizers has only Adam's family; an optimizer's module refuses what ZeRO cannot
        # train.
        "zero_allow_untested_optimizer": True,
        **_precision(config, plan),
    }
    if config.parallel.deepspeed.comms_logger:
        settings["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    if OffloadDevice.nvme in (plan.offload_optimizer, plan.offload_parameters):
        settings["aio"] = {
            "block_size": SWAP_BYTES,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
            **given_aio(config.parallel.deepspeed),
        }
    return settings


def _precision(config: Config, plan: Plan) -> dict[str, Any]:
    """Gradients are sent between ranks in reduce_dtype and accumulate in master_dtype (see `accumulating`)."""
    settings: dict[str, Any] = {
        "communication_data_type": DTYPE_NAMES[plan.reduce_dtype],
        "data_types": {"grad_accum_dtype": DTYPE_NAMES[accumulating(config)]},
    }
    if plan.param_dtype is DType.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif plan.param_dtype is DType.float16:
        # A constant here; the engine overrides it before each step with the dynamic scale that both engines share.
        # DeepSpeed's own dynamic scale divides a gradient by the new value in the step after which the scale grows.
        scale = config.precision.loss_scale or config.precision.loss_scale_init
        settings["fp16"] = {"enabled": True, "loss_scale": scale}
    return settings


def _zero(config: Config, plan: Plan, size: ModelSize, swap_folder: str | None) -> dict[str, Any]:
    bucket = min(5 * 10**8, _even(size.trained))
    settings: dict[str, Any] = {
        "stage": plan.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "allgather_partitions": True,
        "overlap_comm": plan.zero_stage == 3,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.zero_stage == 3:
        settings |= _stage3(config, plan, size)
    settings |= given(config.parallel.deepspeed)
    pin_memory = config.parallel.offload.pin_memory and plan.device == "cuda"
    if plan.offload_optimizer is not OffloadDevice.none:
        settings["offload_optimizer"] = {"device": str(plan.offload_optimizer), "pin_memory": pin_memory}
        if plan.offload_optimizer is OffloadDevice.nvme:
            # One sub-group's parameter, gradient and two moments are in memory at a time.
            settings["offload_optimizer"] |= {"nvme_path": swap_folder, "buffer_count": 4}
    if plan.offload_parameters is not OffloadDevice.none:
        settings["offload_param"] = {"device": str(plan.offload_parameters), "pin_memory": pin_memory}
        if plan.offload_parameters is OffloadDevice.nvme:
            settings["offload_param"] |= _swapped_parameters(config, plan, size, swap_folder)
    return settings


def _stage3(config: Config, plan: Plan, size: ModelSize) -> dict[str, Any]:
    window = max(size.parameters // 4, size.largest)
    on_disk = plan.offload_parameters is OffloadDevice.nvme
    share = ceil(size.trained / plan.degree(SHARD) / 4)
    return {
        # Parameters on disk are read on demand, not prefetched: DeepSpeed reuses the prefetch order of the previous
        # pass, a validation pass disturbs it, and then it runs out of buffers.
        "stage3_prefetch_bucket_size": 0 if on_disk else min(5 * 10**7, window),
        # Norms and biases stay whole on every rank; gathering such small messages costs more than their memory.
        "stage3_param_persistence_threshold": min(10**5, size.largest_vector),
        "stage3_max_live_parameters": min(10**9, window),
        # A parameter that is kept for a later use also keeps its swap buffer, so on disk nothing is kept.
        "stage3_max_reuse_distance": 0 if on_disk else min(10**9, window),
        # The optimizer updates one sub-group at a time. DeepSpeed's 10**9 means a temporary float32 gradient of 4 GB,
        # and with NVMe four pinned buffers of 4 GB, on each rank.
        "sub_group_size": min(10**8, max(share, 4 * _swap_bytes(config) // BYTES[plan.master_dtype])),
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _swapped_parameters(config: Config, plan: Plan, size: ModelSize, swap_folder: str | None) -> dict[str, Any]:
    """A buffer must hold a rank's largest share of a parameter; DeepSpeed's fixed 10**8 elements follow no rule."""
    threads = config.parallel.deepspeed.aio.intra_op_parallelism or 1
    align = lcm(SWAP_BYTES, ALIGNED_BYTES * threads) // BYTES[plan.param_dtype]
    return {
        "nvme_path": swap_folder,
        "buffer_size": ceil(ceil(size.largest / plan.degree(SHARD)) / align) * align,
        "buffer_count": 4 + size.widest_module,
        # Elements per rank that stay in host memory anyway. DeepSpeed's 10**9 would keep most models there.
        "max_in_cpu": 0,
    }


def _swap_bytes(config: Config) -> int:
    return max(SWAP_BYTES, config.parallel.deepspeed.aio.block_size or 0)


def _even(elements: int) -> int:
    return elements + elements % 2
