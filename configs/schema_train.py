"""Keys of `optimizer`, `scheduler`, `train` and `checkpoint`. `configs.schema` holds all sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from configs.choices import (
    Checkpointing,
    Implementation,
    NonFinite,
    OnFailure,
    OptimizerName,
    Schedule,
)


@dataclass(kw_only=True, slots=True)
class RoleGroup:
    """Settings for parameters of one role, instead of those of `optimizer`."""

    lr: float | None = None
    """Peak learning rate, under the same schedule; null: `optimizer.lr`."""
    weight_decay: float | None = None
    """Weight decay; null: `optimizer.weight_decay`, and 0 for norms and biases."""
    name: OptimizerName | None = None
    """Optimizer, with the default `options` of its own; null: `optimizer.name`."""


@dataclass(kw_only=True, slots=True)
class RoleGroups:
    """Parameters by role; the model must have trained parameters of each role that is set."""

    matrix: RoleGroup = field(default_factory=RoleGroup)
    """Linear layers of the decoder."""
    experts: RoleGroup = field(default_factory=RoleGroup)
    """Routed experts."""
    embedding: RoleGroup = field(default_factory=RoleGroup)
    """Embeddings of tokens and positions, tied to the head or not."""
    head: RoleGroup = field(default_factory=RoleGroup)
    """The output layer, from hidden states to logits."""
    router: RoleGroup = field(default_factory=RoleGroup)
    """The layers that choose the experts of a token."""
    vector: RoleGroup = field(default_factory=RoleGroup)
    """Norms, biases, everything else."""


@dataclass(kw_only=True, slots=True)
class Optimizer:
    name: OptimizerName = OptimizerName.adamw
    lr: float = 3e-4
    """Peak learning rate; `muon`: for matrices (see `options`); `adafactor`: a relative step, in units of the matrix's
    root mean square."""
    beta1: float = 0.9
    """`adamw`, `adamw_8bit`, and AdamW within `muon`: decay of the first moment; `sgd`: momentum."""
    beta2: float = 0.95
    """As `beta1`, for the second moment; `adafactor` has its own, 1 - step**-0.8."""
    eps: float = 1e-8
    """Optimizers as for `beta1`: added to the second moment's root; `adafactor`: lower bound of that root."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings; never to norms and biases."""
    implementation: Implementation = Implementation.auto
    """`auto`: adamw, and AdamW within muon, fused; sgd foreach, the others for_loop. `deepspeed_cpu`: DeepSpeed's, for
    offload (needs g++)."""
    in_backward: bool = False
    """Apply and free each gradient as the backward computes it, so no rank holds the whole model's gradients."""
    ema: float = 0.0
    """Decay of a moving average of the weights (0.999), one more state per parameter. Validation, RUN_DIR/model and
    exports use the average; training continues from the weights. 0: none."""
    paged: bool = False
    """Keep states in memory that GPU and host share: when the GPU is full they move to the host, and the run does not
    fail for lack of room. Engine torch on GPUs; needs bitsandbytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of one optimizer only; its file below configs/optimizer/ lists them."""
    target: str | None = None
    """`custom`: path of a class, package.module.Class, a subclass of torch.optim.Optimizer; `options` are its
    arguments."""
    groups: RoleGroups = field(default_factory=RoleGroups)


@dataclass(kw_only=True, slots=True)
class Scheduler:
    name: Schedule = Schedule.cosine
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all steps, rounded up, instead of `warmup_steps`; 0: not used."""
    decay_steps: int = 0
    """`warmup_stable_decay`: steps of the final linear decay."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, relative to `optimizer.lr`."""


@dataclass(kw_only=True, slots=True)
class Samples:
    """Texts that the model generates after each validation."""

    prompts: list[str] = field(default_factory=list)
    """Prompts; with data=chat each is a user's message in the tokenizer's template."""
    from_validation: int = 0
    """Also use the beginnings of this many validation samples as prompts: the tokens before the first trained one, or
    else the first 32 tokens."""
    tokens: int = 64
    """Maximum number of generated tokens."""
    temperature: float = 0.0
    """0 takes the most likely token. Above 0 the choice is drawn from `seed`, the step and the sample's number."""


@dataclass(kw_only=True, slots=True)
class Train:
    steps: int = 100
    """Optimizer updates."""
    epochs: float = 0.0
    """Passes over all training samples, instead of `steps`; fractions are allowed. The beginning of the next epoch
    fills up the last step. 0: not used."""
    micro_batch_size: int | None = None
    """Sequences per data-parallel rank per forward."""
    gradient_accumulation_steps: int | None = None
    """Forwards per optimizer update."""
    global_batch_size: int | None = None
    """Sequences per update over all ranks. Give two of these three keys, and the third is derived. With fewer given,
    `gradient_accumulation_steps` is 1 (2 * pp under a pipeline) and then `micro_batch_size` 8."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """What to recompute in the backward: nothing, whole decoder layers, or every second matmul."""
    chunked_loss: bool = False
    """Compute head and loss in slices of tokens, forward and backward: no rank ever holds all its logits."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training (NEFTune): uniform, at most alpha / sqrt(seq_len * features). 0: none."""
    label_smoothing: float = 0.0
    """Label smoothing: share of each label that is spread evenly over the vocabulary in training, not in validation."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps after a slow first one. Engine torch."""
    clip_grad_norm: float = 1.0
    """Maximum global L2 norm of the gradient; 0 turns clipping off."""
    clip_grad_value: float = 0.0
    """Maximum absolute value of a gradient's element; 0: no limit. Needs no norm: set `clip_grad_norm` to 0."""
    non_finite: NonFinite = NonFinite.stop
    """If loss or gradient is NaN or infinite: end the run, or skip the update (fp16 overflows always skip). If a
    validation loss is: end the run, or warn."""
    eval_every: int = 0
    """Steps between validations; 0: only before the first and after the last step."""
    eval_samples: int = 64
    """Sequences per validation; 0: no validation."""
    samples: Samples = field(default_factory=Samples)
    callbacks: list[str] = field(default_factory=list)
    """Paths of your own classes, package.module.Class, that each rank calls at steps, validations, checkpoints and the
    end: subclasses of `trainer.report.callbacks.Callback`."""
    eval_metric: str = "validation_loss"
    """Loss that `patience` and `checkpoint.best` compare: validation_loss, or validation_loss/NAME of a set."""
    patience: int = 0
    """Maximum number of validations in a row without a lower loss; then the run ends early, as finished. 0: it ends
    after `steps`."""
    min_delta: float = 0.0
    """`patience`: minimum decrease of the loss that counts."""
    seed: int = 0
    run_dir: str | None = None
    """Folder of this run's files. Null: runs/MODEL-LAYOUT-PRECISION/DATE-TIME."""
    export: bool = True
    """Write the finished model as a Hugging Face folder to RUN_DIR/model."""
    resume: str = "auto"
    """`auto`: continue from the newest checkpoint in `run_dir`, if there is one. `never`: refuse a folder with a run.
    A checkpoint or another run's folder: begin a new run from there, and then continue as `auto` does."""
    timeout_minutes: float = 10.0
    """Minutes; a collective that takes longer ends the run."""


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    every: int = 500
    """Steps between two checkpoints. 0: only when the run is asked to stop, and at the end."""
    final: bool = True
    """Also save after the last step, so that a longer run can continue from it."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; a save deletes older ones. Two, because one may prove to be damaged."""
    keep_every: int = 0
    """Keep the checkpoints of steps that are multiples of this number for good. 0: none."""
    best: bool = False
    """Save whenever a validation has the lowest loss so far. That checkpoint stays, as RUN_DIR/checkpoints/best, and
    RUN_DIR/model holds its weights instead of the last ones."""
    async_save: bool = False
    """Copy the state to host memory and train on while it is written. Takes each rank's share of the state in host
    memory (AdamW in float32: 12 bytes per parameter over all ranks); one save at a time."""
    on_failure: OnFailure = OnFailure.stop
    """When a checkpoint cannot be written (the disk is full): `stop` ends the run; `warn` continues and retries at the
    next save."""
