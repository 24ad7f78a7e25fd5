"""Keys of `parallel`. `configs.schema` holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.choices import ContextMethod, DType, EngineName, OffloadDevice


@dataclass(kw_only=True, slots=True)
class Pipeline:
    schedule: str = "1f1b"
    """gpipe, 1f1b, interleaved_1f1b, looped_bfs, interleaved_zero_bubble, zbv_zero_bubble or dualpipev. The
    micro-batches of a step, `train.gradient_accumulation_steps`, flow through the stages."""
    stages_per_rank: int | None = None
    """Number of stages per rank; null: the schedule's default (1, or 2 for interleaved and V-shaped schedules)."""
    split: list[int] | None = None
    """Number of decoder layers in each stage, in order; null: balanced by counted work."""


@dataclass(kw_only=True, slots=True)
class Offload:
    optimizer: OffloadDevice = OffloadDevice.none
    """Device for optimizer states and master weights, instead of the GPU. `cpu`: ZeRO 1-3; `nvme`: ZeRO 3."""
    parameters: OffloadDevice = OffloadDevice.none
    """Device for partitioned parameters, instead of the GPU. ZeRO 3 only."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk; needed by either `nvme`."""
    pin_memory: bool = True
    """Page-lock host buffers on a GPU machine: faster copies, memory the system cannot swap."""


@dataclass(kw_only=True, slots=True)
class Aio:
    """DeepSpeed's disk I/O, for states on NVMe."""

    block_size: int | None = None
    """Bytes per request. Tensors whose share on a rank is smaller stay in memory."""
    queue_depth: int | None = None
    """Maximum number of requests that are queued at the disk."""
    intra_op_parallelism: int | None = None
    """Threads per read or write."""
    single_submit: bool | None = None
    """Submit requests one by one instead of together."""
    overlap_events: bool | None = None
    """Submit further requests while earlier ones run."""


@dataclass(kw_only=True, slots=True)
class DeepSpeed:
    """DeepSpeed's own settings under its own names; sizes in elements. Null: computed from the model
    (docs/zero-and-fsdp.md), or DeepSpeed's default. The memory estimate follows them."""

    reduce_bucket_size: int | None = None
    """Size of the gradient buffer, which is reduced as a whole."""
    allgather_bucket_size: int | None = None
    """Stages 1, 2: size of the buffer in which updated parameters are gathered."""
    overlap_comm: bool | None = None
    """Overlap gradient reduction with the backward. Stages 1, 2: adds a second bucket; stage 3: default true."""
    contiguous_gradients: bool | None = None
    """Stages 1, 2: copy gradients into one buffer as they are produced."""
    reduce_scatter: bool | None = None
    """Send each gradient only to the rank that keeps it; false: send all of it to all ranks."""
    sub_group_size: int | None = None
    """Stage 3: number of a rank's parameters that one optimizer step updates together."""
    stage3_prefetch_bucket_size: int | None = None
    """Stage 3: size of the parameters that are gathered ahead of their use."""
    stage3_param_persistence_threshold: int | None = None
    """Stage 3: parameters of at most this size stay unpartitioned on every rank."""
    stage3_model_persistence_threshold: int | None = None
    """Stage 3: maximum total size of unpartitioned parameters."""
    stage3_max_live_parameters: int | None = None
    """Stage 3: maximum size of gathered parameters; prefetching stops at this limit."""
    stage3_max_reuse_distance: int | None = None
    """Stage 3: a parameter that is used again within this many elements stays gathered."""
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    """Stage 3: gather with an all-reduce of zero-padded shards: fewer copies on the host, twice the traffic."""
    stage3_allgather_sequential: bool | None = None
    """Stage 3: gather each parameter on its own, without a common buffer and without prefetching."""
    zero_hpz_partition_size: int | None = None
    """Stage 3 (hpZ of ZeRO++): number of ranks, usually those of a node, that share a second copy of the parameters.
    The forward creates the copy, and the backward gathers from it."""
    grad_accum_dtype: DType | None = None
    """Stage 3: dtype in which gradients are accumulated over micro-batches. Null: precision.master_dtype. The
    parameters' dtype (DeepSpeed's default) saves 2 bytes per parameter and rounds every sum."""
    aio: Aio = field(default_factory=Aio)
    comms_logger: bool = False
    """Time every message and log the counts by kind and size at the end. Each timed message waits for the device."""


@dataclass(kw_only=True, slots=True)
class FSDP:
    """Settings of FSDP2 (`dp_shard` with engine torch). The memory estimate follows them."""

    reshard_size: int | None = None
    """Number of ranks, usually those of a node, over which a layer's parameters stay sharded between its forward and
    its backward; the backward gathers from these ranks only. Null: all ranks."""
    forward_prefetch: int | None = None
    """Number of layers that the forward prefetches. Null: one, during the layer before it (FSDP2's default)."""
    backward_prefetch: int | None = None
    """Number of layers that the backward prefetches. Null: one."""


@dataclass(kw_only=True, slots=True)
class Parallel:
    preset: str = "custom"
    """Label of the chosen layout, used in the names of runs."""
    engine: EngineName = EngineName.torch
    """Who owns the step: `torch` (native parallelism) or `deepspeed` (ZeRO)."""
    dp_replicate: int | None = 1
    """Number of data-parallel ranks that hold full copies; null: the remaining ranks."""
    dp_shard: int | None = 1
    """Number of data-parallel ranks that shard states among themselves; null: the remaining ranks."""
    tp: int = 1
    """Tensor-parallel degree: number of ranks that split each layer's matrices."""
    cp: int = 1
    """Context-parallel degree: number of ranks that split each sequence."""
    pp: int = 1
    """Pipeline-parallel degree: number of ranks that split the stack of layers."""
    ep: int | None = 1
    """Expert-parallel degree: number of ranks out of dp_shard * cp * tp that split each layer's experts; null: all."""
    tensor_plan: dict[str, str] = field(default_factory=dict)
    """With `tp`: overrides of the architecture's own plan, by module:
    `'parallel.tensor_plan={model.layers.*.mlp.up_proj: colwise}'`."""
    context_method: ContextMethod = ContextMethod.ulysses
    """With `cp`: `ulysses` exchanges heads for tokens around attention, `gather` collects all keys and values."""
    sequence_parallel: bool = False
    """With `tp`: norms and residuals hold only 1 / tp of the sequence."""
    reshard_after_forward: bool | None = None
    """With `dp_shard` and engine torch. True: gather parameters again for the backward (like ZeRO 3). False: keep them
    gathered until the end of the backward (like ZeRO 2), or of the step under a pipeline. Null: false under a
    pipeline, else true."""
    zero_stage: int = 0
    """Engine deepspeed: states that ranks partition. 1: optimizer states; 2: also gradients; 3: also parameters."""
    pipeline: Pipeline = field(default_factory=Pipeline)
    offload: Offload = field(default_factory=Offload)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    fsdp: FSDP = field(default_factory=FSDP)
