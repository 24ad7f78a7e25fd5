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
    """What parameters of one role have instead of what `optimizer` says."""

    lr: float | None = None
    """Their peak learning rate, under the same schedule; null: `optimizer.lr`."""
    weight_decay: float | None = None
    """null: `optimizer.weight_decay`, and 0 for norms and biases."""
    name: OptimizerName | None = None
    """What updates them, with the default `options` of its own; null: `optimizer.name`."""


@dataclass(kw_only=True, slots=True)
class RoleGroups:
    """By role; the model must have some of it that are trained."""

    matrix: RoleGroup = field(default_factory=RoleGroup)
    """Linear layers of the model's body."""
    experts: RoleGroup = field(default_factory=RoleGroup)
    """Routed experts."""
    embedding: RoleGroup = field(default_factory=RoleGroup)
    """Tables of tokens and positions, tied to the head or not."""
    head: RoleGroup = field(default_factory=RoleGroup)
    """What scores the vocabulary."""
    router: RoleGroup = field(default_factory=RoleGroup)
    """What chooses the experts of a token."""
    vector: RoleGroup = field(default_factory=RoleGroup)
    """Norms, biases, everything else."""


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
    """As `beta1`: added to the second moment's root; `adafactor`: the lower bound of that root."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings; never to norms and biases."""
    implementation: Implementation = Implementation.auto
    """`auto`: adamw, and AdamW within muon, fused; sgd foreach, the others for_loop. `deepspeed_cpu`: DeepSpeed's, for
    offload (needs g++)."""
    in_backward: bool = False
    """Apply and free each gradient as the backward computes it, so that no rank holds those of the whole model."""
    ema: float = 0.0
    """Decay of a moving average of the weights (0.999), one more state of each parameter. Validation, RUN_DIR/model and
    exports then have the average, training goes on from the weights. 0: none."""
    paged: bool = False
    """Keep states where GPU and host share memory: when the GPU is full they move to the host, and no run ends for lack
    of room for them. Engine torch on GPUs; needs bitsandbytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """What one optimizer alone reads; its file below configs/optimizer/ lists them."""
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
    """The warm-up as a part of all steps, rounded up, instead of `warmup_steps`; 0: not used."""
    decay_steps: int = 0
    """`warmup_stable_decay`: steps of the final linear decay."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a part of `optimizer.lr`."""


@dataclass(kw_only=True, slots=True)
class Samples:
    """Texts that the model writes after each validation."""

    prompts: list[str] = field(default_factory=list)
    """Texts to go on from; with data=chat each is a user's message in the template of the tokenizer."""
    from_validation: int = 0
    """Go on from the beginnings of this many validation samples too: what stands before the first token that is trained
    on, or else the first 32 tokens."""
    tokens: int = 64
    """Tokens to write at most."""
    temperature: float = 0.0
    """0 takes the likeliest token. Above 0 the choice is drawn from `seed`, the step and the number of the sample."""


@dataclass(kw_only=True, slots=True)
class Train:
    steps: int = 100
    """Optimizer updates."""
    epochs: float = 0.0
    """Passes over all training samples, instead of `steps`; a fraction is allowed. The last step is filled up with the
    begin of the next epoch. 0: not used."""
    micro_batch_size: int | None = None
    """Sequences per data-parallel rank per forward."""
    gradient_accumulation_steps: int | None = None
    """Forwards per optimizer update."""
    global_batch_size: int | None = None
    """Sequences per update over all ranks. Of these three give two, and the third is derived; with fewer given,
    `gradient_accumulation_steps` is 1 (2 * pp under a pipeline) and then `micro_batch_size` 8."""
    activation_checkpointing: Checkpointing = Checkpointing.none
    """What to recompute in the backward: nothing, whole decoder layers, or every second matmul."""
    chunked_loss: bool = False
    """Compute head and loss in slices of tokens, forward and backward: no rank ever holds all its logits."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings in training (NEFTune): uniform, of at most alpha / sqrt(seq_len * features). 0: none."""
    label_smoothing: float = 0.0
    """Part of each label that is spread evenly over the vocabulary, in training; validation has the plain loss."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps after a slow first one. Engine torch."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 turns clipping off."""
    clip_grad_value: float = 0.0
    """Largest absolute value of a gradient's element; 0: no limit. Needs no norm: set `clip_grad_norm` to 0."""
    non_finite: NonFinite = NonFinite.stop
    """When loss or gradient is NaN or infinite: end the run, or leave out the update (fp16 overflows always skip). When
    a validation loss is: end the run, or warn."""
    eval_every: int = 0
    """Steps between validations; 0: only before the first and after the last step."""
    eval_samples: int = 64
    """Sequences per validation; 0: no validation."""
    samples: Samples = field(default_factory=Samples)
    callbacks: list[str] = field(default_factory=list)
    """Paths of classes of your own, package.module.Class, which each rank calls at steps, validations, checkpoints and
    the end: subclasses of `trainer.report.callbacks.Callback`."""
    eval_metric: str = "validation_loss"
    """What `patience` and `checkpoint.best` compare: that, or validation_loss/NAME, of `data.validation_sets`."""
    patience: int = 0
    """Validations in a row that may bring no lower loss before the run ends early, as finished. 0: it ends after
    `steps`."""
    min_delta: float = 0.0
    """`patience`: the loss must be lower by more than this to count."""
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
    """Steps between two checkpoints. 0: only when the run is asked to stop, and at the end."""
    final: bool = True
    """One more after the last step, from which a longer run can go on."""
    keep_last: int = 2
    """Newest checkpoints that stay; older ones are deleted after each save. Two, so that one may turn out damaged."""
    keep_every: int = 0
    """Steps whose checkpoints stay for good: the multiples of this number. 0: none."""
    best: bool = False
    """Save where a validation has the lowest loss so far. That checkpoint stays, as RUN_DIR/checkpoints/best, and
    RUN_DIR/model holds its weights instead of the last ones."""
    async_save: bool = False
    """Copy the state to host memory and go on training while it is written. Takes each rank's part of the state in host
    memory (AdamW in float32: 12 bytes per parameter over all ranks); one save at a time."""
    on_failure: OnFailure = OnFailure.stop
    """When a checkpoint cannot be written (the disk is full): `stop` ends the run, `warn` goes on and
    tries again next time."""
