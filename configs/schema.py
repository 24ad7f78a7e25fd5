"""Every key of the configuration: its type, its default, its meaning.

The YAML files in this folder state only choices and differences; a default stands here and nowhere else: in
`configs.schema_data` for `data`, in `configs.schema_train` for `optimizer`, `scheduler`, `train` and `checkpoint`, in
`configs.schema_cluster` for `cluster` and `launcher`, and below for the rest. The schema checks names and types.
Whether the values make sense together is the plan's business (`trainer.plan.plan`), which is also the only place that
derives numbers from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import (
    AdapterInit,
    Attention,
    Balance,
    ContextMethod,
    DType,
    EngineName,
    EstimateFormat,
    Gate,
    MissingWeights,
    OffloadDevice,
    ProgressDisplay,
    Recipe,
    TuningMethod,
    Weights,
)
from configs.schema_cluster import Cluster, Launcher
from configs.schema_data import Data
from configs.schema_train import Checkpoint, Optimizer, Scheduler, Train


@dataclass(kw_only=True, slots=True)
class Model:
    preset: str = "custom"
    """Label of the chosen model, used in the names of runs."""
    path: str | None = None
    """A local folder or a hub id. Its config.json is the architecture; `config` below overrides it."""
    target: str | None = None
    """The path of a class of your own, package.module.Class, that is the model (docs/python.md); `config` below has the
    fields of its config."""
    weights: Weights = Weights.random
    """`random`: initialised from `train.seed`. `pretrained`: read from `path`."""
    missing_weights: MissingWeights = MissingWeights.refuse
    """`pretrained`: tensors of the model that `path` does not hold. `random`: drawn from `train.seed`."""
    resize_vocabulary: bool = False
    """Add rows to a pretrained embedding and head for tokens that the tokenizer has and the model has not."""
    attention: Attention = Attention.auto
    """Attention kernel; `auto` lets transformers choose what the architecture supports (`sdpa` nearly always)."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """A preset's published dimensions, as fields of the Hugging Face config. Not used when `path` is set."""
    config: dict[str, Any] = field(default_factory=dict)
    """Any field of the Hugging Face config, over `architecture` or `path`: `model.config.num_hidden_layers=4`."""
    text_only: bool = False
    """Of a model that reads images or sound as well, build and train the language model alone: every layout can cut it.
    False: the whole model as transformers builds it; what is not of the text gets no gradient."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Allow the model folder to run its own Python code."""


@dataclass(kw_only=True, slots=True)
class Pipeline:
    schedule: str = "1f1b"
    """gpipe, 1f1b, interleaved_1f1b, looped_bfs, interleaved_zero_bubble, zbv_zero_bubble or dualpipev. The
    micro-batches of a step, `train.gradient_accumulation_steps`, are what flows through the stages."""
    stages_per_rank: int | None = None
    """Stages that each rank holds; null: what the schedule asks for (1, or 2 for interleaved and V-shaped ones)."""
    split: list[int] | None = None
    """Decoder layers of each stage, in order; null: balanced by counted work."""


@dataclass(kw_only=True, slots=True)
class Offload:
    optimizer: OffloadDevice = OffloadDevice.none
    """Where optimizer states and master weights live instead of the GPU. `cpu`: ZeRO 1-3; `nvme`: ZeRO 3."""
    parameters: OffloadDevice = OffloadDevice.none
    """Where partitioned parameters live instead of the GPU. ZeRO 3 only."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk; needed by either `nvme`."""
    pin_memory: bool = True
    """Page-lock host buffers on a GPU machine: faster copies, memory the system cannot swap."""


@dataclass(kw_only=True, slots=True)
class Aio:
    """Reads and writes of the disk under DeepSpeed, with states on NVMe."""

    block_size: int | None = None
    """Bytes of one request. Tensors whose part on a rank is smaller than this stay in memory."""
    queue_depth: int | None = None
    """Requests that wait at the disk at a time."""
    intra_op_parallelism: int | None = None
    """Threads of one read or write."""
    single_submit: bool | None = None
    """Submit requests one by one instead of together."""
    overlap_events: bool | None = None
    """Submit further requests while earlier ones run."""


@dataclass(kw_only=True, slots=True)
class DeepSpeed:
    """DeepSpeed's own settings under its own names, sizes in elements. Null: computed from the model
    (docs/zero-and-fsdp.md), or DeepSpeed's usual value. The estimate of memory follows them."""

    reduce_bucket_size: int | None = None
    """Gradients that cross ranks at a time: a buffer of this size."""
    allgather_bucket_size: int | None = None
    """Stages 1, 2: updated parameters that are gathered at a time."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward goes on. Stages 1, 2: with a second bucket; stage 3 does so unless false."""
    contiguous_gradients: bool | None = None
    """Stages 1, 2: copy gradients into one buffer as they come."""
    reduce_scatter: bool | None = None
    """Send a gradient to the ranks that keep it alone; false: all ranks get all of it."""
    sub_group_size: int | None = None
    """Stage 3: parameters of a rank that are updated at a time."""
    stage3_prefetch_bucket_size: int | None = None
    """Stage 3: parameters that are gathered ahead of their use."""
    stage3_param_persistence_threshold: int | None = None
    """Stage 3: parameters of at most this size stay whole on every rank."""
    stage3_model_persistence_threshold: int | None = None
    """Stage 3: parameters that stay whole, all in all, at most."""
    stage3_max_live_parameters: int | None = None
    """Stage 3: parameters that are gathered at a time, at most; nothing is gathered ahead beyond it."""
    stage3_max_reuse_distance: int | None = None
    """Stage 3: a parameter that is used again within this many elements stays gathered."""
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    """Stage 3: gather by an all-reduce of zeros and parts, which copies less on the host and sends twice as much."""
    stage3_allgather_sequential: bool | None = None
    """Stage 3: gather each parameter by itself, without a common buffer and nothing ahead."""
    zero_hpz_partition_size: int | None = None
    """Stage 3 (hpZ of ZeRO++): ranks that share a second copy of the parameters, usually those of a node. It is made
    in the forward, and the backward gathers from it."""
    grad_accum_dtype: DType | None = None
    """Stage 3: dtype in which gradients add up over micro-batches. Null: precision.master_dtype. That of the parameters
    (DeepSpeed's usual one) takes 2 bytes less for each and rounds every sum."""
    aio: Aio = field(default_factory=Aio)
    comms_logger: bool = False
    """Time every message, each of which then waits for the device, and log at the end how many there were of each kind
    and size."""


@dataclass(kw_only=True, slots=True)
class FSDP:
    """Settings of FSDP2 (`dp_shard` with engine torch). The estimate of memory follows them."""

    reshard_size: int | None = None
    """Ranks, usually those of a node, over which a layer's parameters stay sharded between its forward and its
    backward, which then gathers them from these alone. Null: over all."""
    forward_prefetch: int | None = None
    """Layers that are gathered ahead in the forward. Null: one while the layer before computes, as FSDP2 does it."""
    backward_prefetch: int | None = None
    """Layers that are gathered ahead in the backward. Null: one."""


@dataclass(kw_only=True, slots=True)
class Parallel:
    preset: str = "custom"
    """Label of the chosen layout, used in the names of runs."""
    engine: EngineName = EngineName.torch
    """Who owns the step: `torch` (native parallelism) or `deepspeed` (ZeRO)."""
    dp_replicate: int | None = 1
    """Data-parallel ranks that hold full copies; null: as many as the world leaves."""
    dp_shard: int | None = 1
    """Data-parallel ranks that partition states among themselves; null: as many as the world leaves."""
    tp: int = 1
    """Ranks that split each layer's matrices among themselves."""
    cp: int = 1
    """Ranks that split each sequence among themselves."""
    pp: int = 1
    """Ranks that split the stack of layers among themselves."""
    ep: int | None = 1
    """Of the ranks of dp_shard * cp * tp: how many split the experts of each layer among themselves; null: all."""
    tensor_plan: dict[str, str] = field(default_factory=dict)
    """With `tp`: how modules are cut, laid over the architecture's own plan:
    `'parallel.tensor_plan={model.layers.*.mlp.up_proj: colwise}'`."""
    context_method: ContextMethod = ContextMethod.ulysses
    """With `cp`: `ulysses` exchanges heads for tokens around attention, `gather` collects all keys and values."""
    sequence_parallel: bool = False
    """With `tp`: norms and residuals hold only 1 / tp of the sequence."""
    reshard_after_forward: bool | None = None
    """With `dp_shard` and engine torch. True: parameters are gathered again for the backward (as ZeRO 3); false:
    they stay gathered until the end of the backward (as ZeRO 2), or of the step under a pipeline.
    Null: false under a pipeline, else true."""
    zero_stage: int = 0
    """Engine deepspeed: what data-parallel ranks partition. 1: optimizer states; 2: + gradients; 3: + parameters."""
    pipeline: Pipeline = field(default_factory=Pipeline)
    offload: Offload = field(default_factory=Offload)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    fsdp: FSDP = field(default_factory=FSDP)


@dataclass(kw_only=True, slots=True)
class Float8:
    recipe: Recipe = Recipe.none
    """Matmuls of linear layers in 8 bits. `tensorwise`: one scale for a tensor; `rowwise`: one for each row;
    `rowwise_with_gw_hp`: the same, and the weights' gradients are computed in `param_dtype`; `mxfp8`: one for each 32
    values (Blackwell). `none`: in `param_dtype`."""
    head: bool = False
    """Convert the head as well, whose logits are the most sensitive product."""
    exclude: list[str] = field(default_factory=list)
    """Names of linear layers that stay in `param_dtype`, or their last parts: [down_proj]. Each must match."""
    all_gather: bool | None = None
    """`tensorwise`, where FSDP2 holds the parameters: cast to float8 before they are gathered, which halves the bytes.
    Null: wherever that is possible."""


@dataclass(kw_only=True, slots=True)
class Precision:
    preset: str = "fp32"
    """Label of the chosen precision, used in the names of runs."""
    param_dtype: DType = DType.float32
    """Forward and backward compute in it."""
    reduce_dtype: DType = DType.float32
    """Gradients cross between ranks in it."""
    master_dtype: DType = DType.float32
    """The optimizer's copy of the parameters, and its states."""
    tf32: bool = False
    """On NVIDIA GPUs since Ampere: float32 matmuls in TF32 (10-bit mantissa)."""
    loss_scale: float | None = None
    """float16 only. Null: dynamic; a number: that constant scale."""
    loss_scale_init: float = 65536.0
    """Dynamic loss scale before the first step. A power of two."""
    loss_scale_window: int = 1000
    """Steps without overflow after which a dynamic loss scale doubles."""
    float8: Float8 = field(default_factory=Float8)


@dataclass(kw_only=True, slots=True)
class Tuning:
    method: TuningMethod = TuningMethod.full
    """`full`: every parameter is trained. `lora`: adapters beside the linear layers are, the model is frozen.
    `qlora`: the same, the frozen linear layers in 4 bits. `ia3`: factors of keys, values and the MLP's features.
    `adapter`: two thin matrices behind the MLP of every layer. `prompt`, `p_tuning`, `prefix`: virtual tokens before
    the text, as embeddings, through an encoder, as keys and values of every layer."""
    rank: int = 16
    """Adapters: rows of an adapter's first matrix, columns of its second."""
    alpha: float = 32.0
    """Adapters: what an adapter adds is multiplied by alpha / rank."""
    rslora: bool = False
    """Adapters: multiplied by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly."""
    dora: bool = False
    """Adapters: a trained length for each row of a matrix too; the adapter then changes the row's direction."""
    init: AdapterInit = AdapterInit.kaiming
    """Adapters: their first values. `kaiming`, `gaussian`: the first matrix random, the second 0. `pissa` (largest
    singular values), `olora` (QR): the adapter begins as a part of the frozen matrix, which keeps the rest."""
    dropout: float = 0.0
    """Adapters: part of an adapter's inputs that is dropped in training."""
    target_modules: list[str] = field(default_factory=list)
    """Adapters: names of what gets one, or their last parts: linear layers [q_proj, v_proj], or stacked experts
    [experts.down_proj]; each must match. An entry with one of *+?()[]|\\^$ is a regular expression for whole names.
    Empty, or all-linear: all linear layers of the decoder layers but routers."""
    layers: list[int] = field(default_factory=list)
    """Adapters: numbers of the decoder layers that get some, from 0; empty: all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Adapters: names of modules, or their last parts, that are trained whole as well [lm_head, norm]."""
    bottleneck: int = 64
    """`adapter`: features between its two matrices."""
    after_attention: bool = False
    """`adapter`: one behind the attention of every layer too, as Houlsby et al. have it; false: as Pfeiffer et al."""
    virtual_tokens: int = 20
    """`prompt`, `p_tuning`, `prefix`: how many tokens are put before the text; no loss is taken of them."""
    adapter: str | None = None
    """Folder of an adapter, as peft or this trainer writes it, to go on from; `model.path` is then its base, and the
    keys above are those of the folder. `model.path=FOLDER` sets both."""
    double_quantization: bool = True
    """`qlora`: the scales of the 4-bit weights in 8 bits too; false: in float32, 0.05 bytes more per value."""


@dataclass(kw_only=True, slots=True)
class Moe:
    """Models with routed experts alone."""

    balance: Balance = Balance.none
    """Term of the loss that keeps the experts' load even: `none`; `micro_batch` (transformers' own, of each
    micro-batch), `sequence` (of each sequence), `global_batch` (by the load of the whole step before)."""
    coefficient: float | None = None
    """What the term is multiplied by; null: what the model's config asks for (`router_aux_loss_coef` and the like)."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss, which keeps the routers' logits small; 0: none."""
    bias_update_rate: float = 0.0
    """Step of the bias by which routers correct themselves without a loss (`e_score_correction_bias`); 0: it stays."""


@dataclass(kw_only=True, slots=True)
class Logging:
    every: int = 1
    """Steps between two lines of metrics."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """`auto`: a live bar on a terminal, single lines elsewhere."""
    curve: bool | None = None
    """Draw the loss curve of a finished run in characters. Null: on a terminal alone."""
    tracker: str = "none"
    """`none`, `wandb`, or another that Accelerate knows: aim, clearml, comet_ml, dvclive, mlflow, swanlab,
    tensorboard, trackio. `custom`: a class of your own."""
    target: str | None = None
    """`custom`: the path of that class, package.module.Class (docs/python.md)."""
    project: str = "distributed-training-cookbook"
    run_name: str | None = None
    """What a tracker calls the run. Null: MODEL-LAYOUT-PRECISION-DATE-TIME, as the run folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed on to the tracker as they are (`logging.options.entity=my-team` for wandb). Never a key or password."""


@dataclass(kw_only=True, slots=True)
class Estimate:
    format: EstimateFormat = EstimateFormat.table
    """What `memory-estimate` prints."""
    explain: bool = False
    """Below the table: every term with its numbers, and where it is from."""
    plot: str | None = None
    """FILE.html or FILE.png (needs matplotlib): memory over one step by component; bars for a sweep."""
    suggest: bool = True
    """What to change so that it fits; the largest micro-batch if it does."""
    search: bool = False
    """Instead of one layout, rank all that this trainer can run on the cluster: those that fit, by predicted speed."""
    explore: str | None = None
    """FILE.html: a page on which the layout, its degrees, micro-batch, recompute, sequence length, optimizer and
    precision are chosen, with memory, predicted speed and command. With -m, the overrides that list several values are
    its controls."""
    efficiency: float = 0.6
    """Assumed by `estimate.search`: part of the GPU's peak FLOP/s that large matmuls get."""
    imbalance: float = 1.0
    """With `parallel.ep`: tokens that the busiest rank's experts get, over the average. 1: the router is balanced."""
    gate: Gate = Gate.refuse
    """`python -m launch` on GPUs, by what the prediction says of the device: `off` does not look, `warn` starts what
    does not fit, `refuse` does not, `strict` does not start what is tight either."""
    measure: bool = False
    """On the CPU, where no allocator keeps count: the trainer counts its tensors over the first two steps, which get
    slower, to compare them with the prediction. On GPUs torch's allocator counts, unasked."""
    context_gib: float = 0.7
    """Assumed: what the CUDA context and loaded kernels take of each GPU, outside torch's allocator (0.4 to 1.0)."""
    nccl_gib: float = 0.3
    """Assumed: what NCCL takes for each communicator of a rank (0.1 to 0.5)."""


@dataclass(kw_only=True, slots=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    precision: Precision = field(default_factory=Precision)
    tuning: Tuning = field(default_factory=Tuning)
    moe: Moe = field(default_factory=Moe)
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)
    launcher: Launcher = field(default_factory=Launcher)
    logging: Logging = field(default_factory=Logging)
    estimate: Estimate = field(default_factory=Estimate)
    profile: bool = False
    """Trace `profile_steps` with torch's profiler, and draw the memory of the first two steps against the prediction:
    files in RUN_DIR/profile."""
    profile_steps: list[int] = field(default_factory=lambda: [3, 4])
    """Read by `profile`: the steps to trace, counted from 1. A step with its shapes is some MB for each rank."""
    dry_run: bool = False
    """`python -m launch` and `python -m trainer`: print plan and command, start nothing."""
