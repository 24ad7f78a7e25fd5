"""Every key of the configuration: its type, its default, its meaning.

The YAML files in this folder contain only choices and differences. Each default stands in one place: in
`configs.schema_data` for `data`, in `configs.schema_parallel` for `parallel`, in `configs.schema_train` for
`optimizer`, `scheduler`, `train` and `checkpoint`, in `configs.schema_cluster` for `cluster` and `launcher`, and below
for the rest. The schema checks names and types. The plan (`trainer.plan.plan`) checks whether the values make sense
together, and is the only place that derives numbers from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import (
    AdapterInit,
    Attention,
    Balance,
    DType,
    EstimateFormat,
    Gate,
    MissingWeights,
    ProgressDisplay,
    Recipe,
    TuningMethod,
    Weights,
)
from configs.schema_cluster import Cluster, Launcher
from configs.schema_data import Data
from configs.schema_parallel import FSDP, DeepSpeed, Offload, Parallel, Pipeline  # noqa: F401
from configs.schema_train import Checkpoint, Optimizer, Scheduler, Train


@dataclass(kw_only=True, slots=True)
class Model:
    preset: str = "custom"
    """Label of the chosen model, used in the names of runs."""
    path: str | None = None
    """A local folder or a hub id. Its config.json is the architecture; `config` below overrides it."""
    target: str | None = None
    """Path of your own model class, package.module.Class (docs/python.md); `config` below holds the fields of its
    config."""
    weights: Weights = Weights.random
    """`random`: initialised from `train.seed`. `pretrained`: read from `path`."""
    missing_weights: MissingWeights = MissingWeights.refuse
    """Tensors of the model that `path` does not hold. `refuse`: an error. `random`: drawn from `train.seed`."""
    resize_vocabulary: bool = False
    """Add rows to a pretrained embedding and head for tokens of the tokenizer that the model does not have."""
    attention: Attention = Attention.auto
    """Attention kernel; `auto` lets transformers choose what the architecture supports (`sdpa` nearly always)."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """A preset's published dimensions, as fields of the Hugging Face config. Not used when `path` is set."""
    config: dict[str, Any] = field(default_factory=dict)
    """Any field of the Hugging Face config, over `architecture` or `path`: `model.config.num_hidden_layers=4`."""
    text_only: bool = False
    """For a model that also reads images or sound: build and train only its language model, which every layout can
    split. False: the whole model as transformers builds it; parts that do not process text get no gradient."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Allow the model folder to run its own Python code."""


@dataclass(kw_only=True, slots=True)
class Float8:
    recipe: Recipe = Recipe.none
    """8-bit matmuls in linear layers. `tensorwise`: one scale per tensor; `rowwise`: one per row; `rowwise_with_gw_hp`:
    one per row, with weight gradients in `param_dtype`; `mxfp8`: one per 32 values (Blackwell). `none`: matmuls in
    `param_dtype`."""
    head: bool = False
    """Convert the head as well. Its logits are the most sensitive matmul."""
    exclude: list[str] = field(default_factory=list)
    """Linear layers that stay in `param_dtype`, by name or last part of it: [down_proj]. Each must match."""
    all_gather: bool | None = None
    """`tensorwise` with FSDP2: cast parameters to float8 before they are gathered, which halves the bytes. Null:
    wherever that is possible."""


@dataclass(kw_only=True, slots=True)
class Precision:
    preset: str = "fp32"
    """Label of the chosen precision, used in the names of runs."""
    param_dtype: DType = DType.float32
    """Dtype of the forward and backward computation."""
    reduce_dtype: DType = DType.float32
    """Dtype of gradients in collectives between ranks."""
    master_dtype: DType = DType.float32
    """Dtype of the optimizer's copy of the parameters, and of its states."""
    tf32: bool = False
    """On NVIDIA GPUs since Ampere: float32 matmuls in TF32 (10-bit mantissa)."""
    loss_scale: float | None = None
    """float16 only. Null: dynamic loss scale; a number: constant scale."""
    loss_scale_init: float = 65536.0
    """Dynamic loss scale before the first step. A power of two."""
    loss_scale_window: int = 1000
    """Steps without overflow after which a dynamic loss scale doubles."""
    float8: Float8 = field(default_factory=Float8)


@dataclass(kw_only=True, slots=True)
class Tuning:
    method: TuningMethod = TuningMethod.full
    """`full`: train every parameter. `lora`: train adapters next to the linear layers of a frozen model. `qlora`: the
    same, with the frozen linear layers in 4 bits. `ia3`: train factors of keys, values and the MLP's features.
    `adapter`: train two thin matrices behind the MLP of every layer. `prompt`, `p_tuning`, `prefix`: train virtual
    tokens before the text, as embeddings, through an encoder, or as keys and values of every layer."""
    rank: int = 16
    """Adapters: rank of the low-rank matrices."""
    alpha: float = 32.0
    """Adapters: the adapter's output is scaled by alpha / rank."""
    rslora: bool = False
    """Adapters: scale by alpha / sqrt(rank) instead, so that a larger rank does not learn more slowly."""
    dora: bool = False
    """Adapters: also train a magnitude for each row of a matrix; the adapter then changes only the row's direction."""
    init: AdapterInit = AdapterInit.kaiming
    """Adapters: initial values. `kaiming`, `gaussian`: the first matrix is random, the second 0. `pissa` (largest
    singular values), `olora` (QR): the adapter begins as part of the frozen matrix, which keeps the rest."""
    dropout: float = 0.0
    """Adapters: dropout probability of an adapter's inputs."""
    target_modules: list[str] = field(default_factory=list)
    """Adapters: modules to adapt, by name or last part of it: linear layers [q_proj, v_proj], or stacked experts
    [experts.down_proj]; each must match. An entry with one of *+?()[]|\\^$ is a regular expression for full names.
    Empty, or all-linear: all linear layers of the decoder layers except routers."""
    layers: list[int] = field(default_factory=list)
    """Adapters: indices of the decoder layers to adapt, from 0; empty: all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Adapters: modules, by name or last part of it, that are fully trained as well [lm_head, norm]."""
    bottleneck: int = 64
    """`adapter`: number of features between the two matrices."""
    after_attention: bool = False
    """`adapter`: add one behind every attention too, as in Houlsby et al.; false: as in Pfeiffer et al."""
    virtual_tokens: int = 20
    """`prompt`, `p_tuning`, `prefix`: number of virtual tokens; they contribute no loss."""
    adapter: str | None = None
    """Folder of an adapter, written by peft or this trainer, to continue from. `model.path` is then its base, and the
    keys above are taken from the folder. `model.path=FOLDER` sets both."""
    double_quantization: bool = True
    """`qlora`: quantize the scales of the 4-bit weights to 8 bits too; false: float32, 0.05 bytes more per value."""


@dataclass(kw_only=True, slots=True)
class Moe:
    """Only for models with routed experts."""

    balance: Balance = Balance.none
    """Loss term that balances the experts' load: `none`; `micro_batch` (transformers' own, per micro-batch), `sequence`
    (per sequence), `global_batch` (by the load of the whole previous step)."""
    coefficient: float | None = None
    """Coefficient of that term; null: from the model's config (`router_aux_loss_coef` and the like)."""
    z_loss: float = 0.0
    """Coefficient of the router z-loss, which keeps the routers' logits small; 0: none."""
    bias_update_rate: float = 0.0
    """Step of the bias with which routers balance without a loss (`e_score_correction_bias`); 0: constant bias."""


@dataclass(kw_only=True, slots=True)
class Logging:
    every: int = 1
    """Steps between two lines of metrics."""
    progress: ProgressDisplay = ProgressDisplay.auto
    """`auto`: a live bar on a terminal, single lines elsewhere."""
    curve: bool | None = None
    """Draw the loss curve of a finished run in characters. Null: only on a terminal."""
    tracker: str = "none"
    """`none`, `wandb`, or another that Accelerate knows: aim, clearml, comet_ml, dvclive, mlflow, swanlab,
    tensorboard, trackio. `custom`: a class of your own."""
    target: str | None = None
    """`custom`: path of that class, package.module.Class (docs/python.md)."""
    project: str = "distributed-training-cookbook"
    run_name: str | None = None
    """The tracker's name for the run. Null: MODEL-LAYOUT-PRECISION-DATE-TIME, as the run folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the tracker unchanged (`logging.options.entity=my-team` for wandb). Never put a key here."""


@dataclass(kw_only=True, slots=True)
class Estimate:
    format: EstimateFormat = EstimateFormat.table
    """What `memory-estimate` prints."""
    explain: bool = False
    """Below the table: every term with its numbers and its origin."""
    plot: str | None = None
    """FILE.html or FILE.png (needs matplotlib): memory over one step by component; bars for a sweep."""
    suggest: bool = True
    """Suggest changes so that the run fits; the largest micro-batch if it does."""
    search: bool = False
    """Instead of one layout, rank all layouts that run on the cluster and fit, by predicted speed."""
    explore: str | None = None
    """FILE.html: a page with controls for layout, degrees, micro-batch, recompute, sequence length, optimizer and
    precision, which shows memory, predicted speed and command. With -m, its controls are the overrides that list
    several values."""
    efficiency: float = 0.6
    """Assumption of `estimate.search`: fraction of the GPU's peak FLOP/s that large matmuls reach."""
    imbalance: float = 1.0
    """With `parallel.ep`: tokens of the busiest rank's experts, relative to the average. 1: balanced router."""
    gate: Gate = Gate.refuse
    """`python -m launch` on GPUs, when the prediction exceeds the device. `off`: not checked. `warn`: starts the run.
    `refuse`: does not start it. `strict`: does not start a tight one either."""
    measure: bool = False
    """On the CPU, which has no counting allocator: count tensors over the first two steps, to compare them with the
    prediction; these steps get slower. On GPUs torch's allocator always counts."""
    context_gib: float = 0.7
    """Assumption: GiB per GPU for the CUDA context and loaded kernels, outside torch's allocator (0.4 to 1.0)."""
    nccl_gib: float = 0.3
    """Assumption: GiB per NCCL communicator of a rank (0.1 to 0.5)."""


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
    """Steps that `profile` traces, counted from 1. A step with its shapes is some MB per rank."""
    dry_run: bool = False
    """`python -m launch` and `python -m trainer`: print plan and command, start nothing."""
