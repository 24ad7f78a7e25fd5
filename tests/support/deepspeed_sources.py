"""Checkpoints of DeepSpeed's own engine with a transformers model, made as user scripts make them."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from configs.schema import Config
from tests.support.deepspeed_cases import allow_float16
from tests.support.harness import Overrides, composed, composes
from trainer.data.build import build_data
from trainer.engine.deepspeed.setup import import_deepspeed
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan
from trainer.process.runtime import join_world

LR, WEIGHT_DECAY, WINDOW = 1e-2, 0.1, 3
MODEL = [
    "model=tiny",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=45",
    "model.config.mlp_bias=true",
    "model.config.vocab_size=61",
    "model.config.num_hidden_layers=2",
    "model.config.eos_token_id=null",
]
"""Overrides for a model whose numbers of elements do not divide evenly among the ranks."""
RUN = [
    *MODEL,
    "data=synthetic",
    "data.seq_len=16",
    "train.global_batch_size=4",
    "train.eval_samples=0",
    "train.export=false",
    "train.clip_grad_norm=1.0",
    f"optimizer.lr={LR}",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    "optimizer.beta1=0.9",
    "optimizer.beta2=0.95",
    "optimizer.eps=1e-8",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One training by DeepSpeed.

    stage: ZeRO stage.
    precision: `bf16`, `fp16` or "" for none.
    data_types: whether to set `data_types`; stage 1 in bfloat16 then uses another optimizer.
    groups: whether weight decay applies to matrices only.
    frozen: name prefixes of frozen parameters.
    sub_group: `sub_group_size`, in elements.
    warmup: number of updates of DeepSpeed's WarmupLR.
    tied: whether the head shares the embedding's weight.
    offload: whether the optimizer states are in host memory.
    tensor: tensor-parallel ranks.
    steps: updates before the save.
    adapters: folder for the base model of peft's adapters; "" trains without adapters.
    """

    name: str
    stage: int
    precision: str = ""
    data_types: bool = False
    groups: bool = False
    frozen: tuple[str, ...] = ()
    sub_group: int | None = None
    warmup: int = 8
    tied: bool = False
    adapters: str = ""
    offload: bool = False
    tensor: int = 1
    steps: int = 3


@dataclass
class Trained:
    """Results of a training by DeepSpeed.

    losses, scales: loss and loss scale of each step, including the steps after the save.
    state: {kind/name: full tensor} at the save.
    end: the same after the last step.
    """

    losses: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)


@composes
def train_with_deepspeed(overrides: Overrides, folder: str, sources: Sequence[Source], further: int) -> list[Trained]:
    """Train each source, save it to `folder`/NAME, and train `further` steps.

    The config gives the model, the data and the batch size.
    """
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1):
        deepspeed = import_deepspeed("cpu")
        if any(source.precision == "fp16" for source in sources):
            allow_float16()
        deepspeed.init_distributed(verbose=False)
        return [_train(deepspeed, config, plan, Path(folder), source, further) for source in sources]


def _train(deepspeed: Any, config: Config, plan: Plan, folder: Path, source: Source, further: int) -> Trained:
    steps, trained = _steps(config, plan), Trained()
    engine = start(deepspeed, config, plan, source)
    for step in range(source.steps + further):
        if step == source.steps:
            trained.state = whole_state(engine)
            engine.save_checkpoint(str(folder / source.name))
        if source.precision == "fp16":
            trained.scales.append(float(engine.optimizer.loss_scale))
        trained.losses.append(advance(engine, next(steps)))
    trained.end = whole_state(engine)
    engine.destroy()
    return trained


@composes
def train_divided(overrides: Overrides, folder: str, sources: Sequence[Source]) -> list[dict[str, torch.Tensor] | None]:
    """Train two steps with tensor parallel. Returns the full weights of each source on rank 0."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1):
        deepspeed = import_deepspeed("cpu")
        deepspeed.init_distributed(verbose=False)
        found: list[dict[str, torch.Tensor] | None] = []
        for source in sources:
            engine = start(deepspeed, config, plan, source)
            for _, batches in zip(range(2), _steps(config, plan, rank=0), strict=False):
                advance(engine, batches)
            engine.save_checkpoint(str(Path(folder) / source.name))
            whole = engine._consolidated_16bit_state_dict()
            found.append({name: tensor.clone() for name, tensor in whole.items()} if whole else None)
            engine.destroy()
        return found


def to_universal(save: Path, target: Path) -> None:
    """Convert a save with DeepSpeed's own converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(save), "output_folder": str(target)}
    with redirect_stdout(io.StringIO()):
        main(argparse.Namespace(**options, **folders, inject_missing_state=True))


@composes
def go_on_with_deepspeed(
    overrides: Overrides, folders: Sequence[str], sources: Sequence[Source], further: int
) -> list[Trained]:
    """For each source, load the universal checkpoint in its folder and train `further` steps."""
    config = composed(overrides)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1):
        deepspeed = import_deepspeed("cpu")
        deepspeed.init_distributed(verbose=False)
        return [
            _go_on(deepspeed, config, plan, folder, source, further)
            for folder, source in zip(folders, sources, strict=True)
        ]


def _go_on(deepspeed: Any, config: Config, plan: Plan, folder: str, source: Source, further: int) -> Trained:
    engine = start(deepspeed, config, plan, source, seed=8, more={"checkpoint": {"load_universal": True}})
    path, _ = engine.load_checkpoint(folder)
    assert path is not None, "nothing was loaded"
    # In stage 3 all rows share one update counter, and each row increments it (docs/checkpoints.md).
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()
    assert (engine.global_steps, engine.global_samples) == (source.steps, source.steps * plan.batch.global_batch_size)
    trained, steps = Trained(state=whole_state(engine)), _steps(config, plan, source.steps)
    trained.losses = [advance(engine, next(steps)) for _ in range(further)]
    trained.end = whole_state(engine)
    engine.destroy()
    return trained


def _steps(config: Config, plan: Plan, first: int = 0, rank: int | None = None) -> Iterator[Any]:
    vocab_size, rank = build_hf_config(config.model).vocab_size, dist.get_rank() if rank is None else rank
    return iter(build_data(config, plan, data_rank=rank, vocab_size=vocab_size).steps(first))


def start(
    deepspeed: Any, config: Config, plan: Plan, source: Source, *, seed: int = 7, more: dict[str, Any] | None = None
) -> Any:
    torch.manual_seed(seed)
    hf_config = build_hf_config(config.model)
    hf_config.tie_word_embeddings = source.tied
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    if source.adapters:
        model = _adapted(model, Path(source.adapters))
    for name, parameter in model.named_parameters() if source.frozen else ():
        parameter.requires_grad_(not name.startswith(source.frozen))
    # HF's Trainer also puts norm weights and biases into a group without weight decay.
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if source.groups:
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)
    with redirect_stdout(io.StringIO()):  # the bfloat16 optimizer prints memory readings
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings(plan, source) | (more or {}))[0]


def _adapted(model: Any, folder: Path) -> Any:
    """Save the base model and add adapters to its attention, as user scripts do."""
    from peft import LoraConfig, get_peft_model

    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def settings(plan: Plan, source: Source) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": source.stage}
    if source.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    if source.sub_group is not None:
        zero["sub_group_size"] = source.sub_group
    if source.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    given: dict[str, Any] = {
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": plan.batch.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": LR, "warmup_num_steps": source.warmup, "warmup_type": "linear"},
        },
    }
    if source.tensor > 1:
        given["tensor_parallel"] = {"autotp_size": source.tensor}
    if source.precision == "bf16":
        given["bf16"] = {"enabled": True}
    elif source.precision == "fp16":
        given["fp16"] = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": WINDOW, "hysteresis": 1}
    if source.data_types:
        given["data_types"] = {"grad_accum_dtype": "fp32"}
    return given


def advance(engine: Any, batches: Sequence[Any]) -> float:
    (batch,) = batches
    logits = engine(input_ids=batch.input_ids, use_cache=False).logits.float()
    loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    engine.backward(loss)
    engine.step()
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False  # set after the first group only
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            found: dict[str, Any] = {"model": safe_get_full_fp32_param(parameter)}
            for kind in ("exp_avg", "exp_avg_sq"):
                found[kind] = safe_get_full_optimizer_state(parameter, kind)
            state.update({f"{kind}/{name}": tensor.clone() for kind, tensor in found.items()})
    return state


@composes
def train_by_transformers(overrides: Overrides, folder: str, stage: int) -> Trained:
    """Train 5 steps on the samples of the config with transformers' Trainer and DeepSpeed; save `checkpoint-3`."""
    from transformers import Trainer, TrainingArguments

    config = composed(overrides)
    plan, trained = make_plan(config, find_machine()), Trained()
    with join_world(plan, timeout_minutes=1):
        import_deepspeed("cpu").init_distributed(dist_backend="gloo", verbose=False)
        batches = [batch for _, (batch,) in zip(range(5), _steps(config, plan), strict=False)]
        # The Trainer shifts the labels itself, so each row gets one more token with an ignored label.
        pairs = [pair for b in batches for pair in zip(b.input_ids.tolist(), b.labels.tolist(), strict=True)]
        rows = [{"input_ids": [*ids, 0], "labels": [-100, *labels]} for ids, labels in pairs]

        class Recorded(Trainer):
            def log(self, logs: dict[str, float], *rest: Any, **others: Any) -> None:
                trained.losses.extend([float(logs["loss"])] if "loss" in logs else [])

            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return torch.utils.data.SequentialSampler(rows)  # pyright: ignore[reportArgumentType]

            def _save_checkpoint(self, *given: Any, **others: Any) -> None:
                if self.state.global_step == 3:
                    trained.state = whole_state(self.model_wrapped)
                super()._save_checkpoint(*given, **others)

        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=plan.batch.micro_batch_size,
            max_steps=5,
            save_steps=3,
            logging_steps=1,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            adam_beta2=0.95,
            warmup_steps=2,
            lr_scheduler_type="constant_with_warmup",
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            deepspeed={
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            },
        )
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(build_hf_config(config.model), dtype=torch.float32)
        Recorded(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
        return trained
