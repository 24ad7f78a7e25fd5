"""Every key of the configuration: its type, its default, its meaning.

The YAML files beside this module state only choices and differences; a default stands here and nowhere
else. The schema checks names and types. Whether the values make sense together is the plan's business
(`trainer.plan.plan`), which is also the only place that derives numbers from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import (
    AdapterInit,
    Attention,
    Balance,
    Bos,
    Checkpointing,
    ClusterKind,
    ContextMethod,
    DataSource,
    Device,
    DType,
    EngineName,
    EstimateFormat,
    Gate,
    GpuRequest,
    Implementation,
    LauncherName,
    MissingWeights,
    NonFinite,
    OffloadDevice,
    OnFailure,
    OptimizerName,
    ProgressDisplay,
    Recipe,
    Schedule,
    TuningMethod,
    Weights,
)


@dataclass(kw_only=True, slots=True)
class Model:
    preset: str = "custom"
    """Label of the chosen model, used in the names of runs."""
    path: str | None = None
    """A local folder or a hub id. Its config.json is the architecture; `config` below overrides it."""
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
class Data:
    source: DataSource = DataSource.builtin
    """`builtin` (the Python standard library's source text), `files`, `chat` (conversations), `hub` or `synthetic`."""
    seq_len: int = 256
    """Tokens per sequence."""
    tokenizer: str | None = None
    """`bytes`, a local folder or a hub id. Null: that of `model.path` if set, else `bytes`."""
    bos: Bos = Bos.auto
    """BOS before each document: `auto` (where the tokenizer puts it before a text), `always` or `never`. The template
    decides for `chat`."""
    control_tokens: bool = False
    """Text that spells a control token (`</s>`, `<|im_end|>`) becomes that token. False: it stays text."""
    paths: list[str] = field(default_factory=list)
    """`files`, `chat`: files, folders or glob patterns: of .txt, .md, .jsonl, .parquet; of .jsonl for `chat`."""
    validation_paths: list[str] = field(default_factory=list)
    """`files`, `chat`: the same for validation; empty: `validation_fraction` of the documents is held out."""
    validation_fraction: float = 0.05
    """Part of the documents (chosen by a hash of their content) held out for validation."""
    text_key: str = "text"
    """Field of a jsonl line, parquet row or hub row that holds the text."""
    messages_key: str = "messages"
    """`chat`: field of a jsonl line that holds the list of messages, each with `role` and `content`."""
    packing: bool = False
    """`chat`: several whole conversations in one sample; false: one each, filled up with padding."""
    document_mask: bool = False
    """Attention stays inside a document or conversation, whose positions begin at 0 wherever it stands in a sample.
    False: it sees what stands before in the same sample, as is usual in pretraining."""
    name: str | None = None
    """`hub`: the name of the data set, or a local folder that `datasets` can load."""
    subset: str | None = None
    """`hub`: the configuration of the data set, where it has several."""
    split: str = "train"
    """`hub`: the split to train on."""
    validation_split: str | None = None
    """`hub`: the split to validate on; null: documents held out of `split`, as for files."""
    revision: str | None = None
    """`hub`: branch, tag or commit."""
    shuffle: bool = True
    """Visit samples in an order drawn from `train.seed` (a new one each epoch)."""
    shuffle_buffer: int = 10_000
    """`hub`: documents held in the streaming shuffle's buffer."""
    ignore_fraction: float = 0.0
    """`synthetic`: up to this part of each sample's labels is ignored (as prompts are in fine-tuning)."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process. `hub` uses one at the most."""
    cache_dir: str = "~/.cache/distributed-training-cookbook"
    """Where tokenised data is kept between runs."""


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
    they stay gathered from the forward to the end of the backward (as ZeRO 2), under a pipeline to that of the step.
    Null: false under a pipeline, else true."""
    zero_stage: int = 0
    """Engine deepspeed: what data-parallel ranks partition. 1: optimizer states; 2: + gradients; 3: + parameters."""
    pipeline: Pipeline = field(default_factory=Pipeline)
    offload: Offload = field(default_factory=Offload)


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
    """On NVIDIA GPUs since Ampere: float32 matrix products in TF32 (10-bit mantissa)."""
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
    `prompt`, `p_tuning`, `prefix`: virtual tokens before the text, as embeddings, through an encoder, as keys and
    values of every layer."""
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
class Optimizer:
    name: OptimizerName = OptimizerName.adamw
    lr: float = 3e-4
    """Peak learning rate; `muon`: of matrices (see `options`); `adafactor`: a step, relative to the root mean square of
    the matrix that it changes."""
    beta1: float = 0.9
    """`adamw`, `adamw_8bit`, and AdamW within `muon`: decay of the first moment; `sgd`: momentum."""
    beta2: float = 0.95
    """As `beta1`, of the second moment; `adafactor` has its own, 1 - step**-0.8."""
    eps: float = 1e-8
    """As `beta1`: added to the second moment's root; `adafactor`: the least that this root may be."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings; never to norms and biases."""
    implementation: Implementation = Implementation.auto
    """`auto`: adamw, and AdamW within muon, fused; sgd foreach, the others for_loop. `deepspeed_cpu`: DeepSpeed's, for
    offload (needs g++)."""
    in_backward: bool = False
    """Apply and free each gradient as the backward computes it, so that no rank holds those of the whole model."""
    options: dict[str, Any] = field(default_factory=dict)
    """What one optimizer alone reads; its file below configs/optimizer/ lists them."""
    target: str | None = None
    """`custom`: path of a class, package.module.Class, a subclass of torch.optim.Optimizer; `options` are its
    arguments."""


@dataclass(kw_only=True, slots=True)
class Scheduler:
    name: Schedule = Schedule.cosine
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    decay_steps: int = 0
    """`warmup_stable_decay`: steps of the final linear decay."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a part of `optimizer.lr`."""


@dataclass(kw_only=True, slots=True)
class Train:
    steps: int = 100
    """Optimizer updates."""
    micro_batch_size: int | None = None
    """Sequences per data-parallel rank per forward."""
    gradient_accumulation_steps: int | None = None
    """Forwards per optimizer update."""
    global_batch_size: int | None = None
    """Sequences per update over all ranks. Of these three give two, and the third is derived; with fewer given,
    `gradient_accumulation_steps` is 1 (2 * pp under a pipeline) and then `micro_batch_size` 8."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """Recompute activations in the backward: of nothing, of whole decoder layers, or of every second product."""
    chunked_loss: bool = False
    """Compute head and loss in slices of tokens, forward and backward: no rank ever holds all its logits."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps after a slow first one. Engine torch."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    clip_grad_value: float = 0.0
    """Largest absolute value of a gradient's element; 0: no limit. Needs no norm: set `clip_grad_norm` to 0."""
    non_finite: NonFinite = NonFinite.stop
    """When loss or gradient is NaN or infinite: end the run, or leave out the update (fp16 overflows always skip)."""
    eval_every: int = 0
    """Steps between validations; 0: only before the first and after the last step."""
    eval_samples: int = 64
    """Sequences per validation; 0: no validation."""
    seed: int = 0
    run_dir: str | None = None
    """Folder of this run's files. Null: runs/MODEL-LAYOUT-PRECISION/DATE-TIME."""
    export: bool = True
    """Write the finished model as a Hugging Face folder to RUN_DIR/model."""
    resume: str = "auto"
    """`auto`: go on from the newest checkpoint in `run_dir`, if there is one. `never`: refuse a folder with a run.
    A checkpoint or another run's folder: begin a new run from there, and then go on as `auto` does."""
    timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    every: int = 500
    """Steps between two checkpoints. 0: only where the run is told to stop, and at the end."""
    final: bool = True
    """One more after the last step, from which a longer run can go on."""
    keep_last: int = 2
    """Newest checkpoints that stay; older ones are deleted after each save. Two, so that one may turn out damaged."""
    keep_every: int = 0
    """Steps whose checkpoints stay for good: the multiples of this number. 0: none."""
    async_save: bool = False
    """Copy the state to host memory and go on training while it is written. Takes each rank's part of the state in host
    memory (AdamW in float32: 12 bytes per parameter over all ranks); one save at a time."""
    on_failure: OnFailure = OnFailure.stop
    """When a checkpoint cannot be written (the disk is full): `stop` ends the run, `warn` goes on and
    tries again next time."""


@dataclass(kw_only=True, slots=True)
class Slurm:
    """Each is an option of sbatch unless it says otherwise; null leaves it to the cluster's default."""

    job_name: str | None = None
    """Null: MODEL-LAYOUT-PRECISION, as the run folder."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    """Limit of one job: MINUTES, HH:MM:SS or D-HH:MM:SS. The run may take longer: the job goes back to the queue."""
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    """How this cluster wants to be asked for GPUs: `--gpus-per-node`, `--gres=gpu`, or not at all."""
    gpu_type: str | None = None
    """The cluster's own name of a GPU type, which goes into that request."""
    cpus_per_node: int | None = None
    """`--cpus-per-task`: one task per node holds all ranks of the node."""
    mem: str | None = None
    """Host memory per node: `64G`; `0` is all of it."""
    constraint: str | None = None
    dependency: str | None = None
    array: str | None = None
    """`1-8%1`: so many jobs, one after another, in the same run folder, where a job may not requeue itself. For a
    sweep (`-m`) `%4`: one array with an element per point, four at a time; null: one job per point."""
    container: str | None = None
    """Image for every node's ranks: `srun --container-image` of the pyxis plug-in."""
    container_mounts: list[str] = field(default_factory=list)
    """`srun --container-mounts`, each FROM:TO; the run folder must be one of them or lie below."""
    python: str | None = None
    """Interpreter of the ranks, where it is not that of the submission: in a container, or from `setup`."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job runs first: `[module load cuda/12.8, source /opt/env.sh]`."""
    sbatch_args: list[str] = field(default_factory=list)
    """Any further options of sbatch, each one word: `[--exclude=node7, --mail-type=END]`."""
    srun_args: list[str] = field(default_factory=list)
    """Any further options of srun, each one word."""
    script: str | None = None
    """A batch script in place of `slurm/job.sbatch`; it gets the same two arguments."""
    signal_seconds: int = 180
    """So long before the time limit the job is told to save and stop. Slurm may be a minute early."""
    max_requeues: int = 100
    """So often a job goes back to the queue. Without a new checkpoint in between, `launcher.max_restarts` holds."""
    start_minutes: float = 20.0
    """A start whose ranks have not met by then is ended and tried again."""


@dataclass(kw_only=True, slots=True)
class Cluster:
    kind: ClusterKind = ClusterKind.local
    """Where `python -m launch` starts the ranks: on this machine (`local`), or as a job (`slurm`)."""
    slurm: Slurm = field(default_factory=Slurm)
    device: Device = Device.auto
    """`auto`: CUDA where there is a GPU, else the CPU."""
    nodes: int = 1
    gpus_per_node: int | None = None
    """Processes per node. Null: what the launcher started; else this machine's GPUs; else CPU processes."""
    gpu: str | None = None
    """A known GPU (`trainer/plan/devices.py`) by a usual name, for its memory and peak FLOP/s: h100, a100-80gb,
    rtx4090. Null: the one that is found."""
    gpu_memory_gib: float | None = None
    """Memory of the GPU that an estimate is compared with; null: that of `gpu`."""
    expandable_segments: bool = True
    """The CUDA allocator grows one segment per stream instead of asking for further ones, and gives back what is free
    before it fails: `PYTORCH_ALLOC_CONF=expandable_segments:True` for the run, and the rules of the estimate."""
    network_gb_per_second: float | None = None
    """Read by `estimate.search`: what one GPU sends to other nodes, 1e9 bytes/s in one direction (an adapter of
    400 Gb/s per GPU: 50). Null: 50."""
    host_gb_per_second: float = 25.0
    """Read by `estimate.search`: what one GPU exchanges with its node's memory, 1e9 bytes/s in one direction."""
    nvme_gb_per_second: float = 3.0
    """Read by `estimate.search`: a GPU's share of its node's NVMe disks, 1e9 bytes/s."""


@dataclass(kw_only=True, slots=True)
class Launcher:
    name: LauncherName = LauncherName.torchrun
    """What `python -m launch` starts the ranks with."""
    master_port: int | None = None
    """Rendezvous port; null: a free one."""
    args: list[str] = field(default_factory=list)
    """Further arguments for the launcher, before `-m trainer`."""
    max_restarts: int = 3
    """When a worker dies or hangs, the job is started again from its newest checkpoint, at most so many times in
    a row. A restart that gets to a new checkpoint begins the count anew. 0: never."""
    preflight: bool | None = None
    """All ranks together compare versions and devices, measure the network, and try the run folder and the disks,
    before anything is built. Null: where there is more than one node."""


@dataclass(kw_only=True, slots=True)
class Logging:
    every: int = 1
    """Steps between two lines of metrics."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """`auto`: a live bar on a terminal, single lines elsewhere."""
    tracker: str = "none"
    """`none`, `wandb`, or another that Accelerate knows: aim, clearml, comet_ml, dvclive, mlflow, swanlab,
    tensorboard, trackio."""
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
    efficiency: float = 0.6
    """Assumed by `estimate.search`: part of the GPU's peak FLOP/s that large matrix products get."""
    imbalance: float = 1.0
    """With `parallel.ep`: tokens that the busiest rank's experts get, over the average. 1: the router is balanced."""
    gate: Gate = Gate.refuse
    """`python -m launch` on GPUs, when the prediction exceeds the device: `off` does not look, `warn` starts
    nevertheless, `refuse` does not start."""
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
