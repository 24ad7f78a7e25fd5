"""Checkpoints written by other trainers themselves.

Each trains the model of `FOLDER/model` on the samples that this trainer reads, in the same order, and returns its
losses. Ranks run them (`harness.run_ranks`) because they keep global state in the process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.support.parity import words
from trainer.data.build import build_data
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine

BATCH, SAVED, STEPS = 8, 2, 4
"""Sequences per step, step of the checkpoint, last step."""
LR, DECAY, CLIP = 3e-3, 0.05, 0.25


def overrides(folder: Path, layout: str, *more: str) -> list[str]:
    """Overrides for the run that resumes: the same model, samples and settings."""
    settings = (f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", "optimizer.beta2=0.95", "scheduler=constant")
    model = (f"model.path={folder / 'model'}", "model.weights=random", "train.eval_samples=0", "train.export=false")
    quiet = ("logging.progress=off", "cluster=cpu", f"train.clip_grad_norm={CLIP}", "scheduler.warmup_steps=0")
    base = words("llama", layout, "fp32", STEPS)
    kept = [word for word in base if not word.startswith(("model", "train.eval_samples"))]
    return [*kept, *model, *settings, *quiet, f"train.global_batch_size={BATCH}", *more]


def samples(folder: Path) -> list[dict[str, list[int]]]:
    """Samples of all steps in the format of transformers.

    transformers shifts the labels itself, so the first label is ignored.
    """
    from configs.load import load_config

    config = load_config(overrides(folder, "single", "train.micro_batch_size=8"))
    data = build_data(config, make_plan(config, find_machine()), data_rank=0, vocab_size=261, local_rank=0)
    rows = []
    for _, batches in zip(range(STEPS), data.steps(0), strict=False):
        for batch in batches:
            for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
                rows.append({"input_ids": [*ids, 0], "labels": [-100, *labels]})
    return rows


def save_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 261}
    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def train_by_transformers(folder: Path, rows: list[Any], more: dict[str, Any], *, rank: int = 0) -> list[float]:
    """Train to the end with a checkpoint of step `SAVED`. Returns the loss of each step.

    rows: samples of `samples`.
    more: further training arguments.
    rank: rank of peft's adapters on the frozen model (0: train the model itself).
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    losses: list[float] = []

    class Recorded(Trainer):
        def log(self, logs: dict[str, float], *rest: Any, **others: Any) -> None:
            losses.extend([float(logs["loss"])] if "loss" in logs else [])
            super().log(logs, *rest, **others)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    ranks = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        output_dir=str(folder / ("adapted" if rank else "out")),
        per_device_train_batch_size=BATCH // 2 // ranks,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta2=0.95,
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    Recorded(model=model, args=arguments, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    return losses


def train_by_fsdp(folder: Path, rows: list[Any], begin: Path | None = None) -> list[float]:
    """Train with torch's FSDP2 to the end, from the start or from `begin`.

    A run from the start writes three checkpoints of step `SAVED`: one as torchtitan does, one in torchtitan's own names
    for Llama, and one with accelerate's functions, as its `save_state` and transformers' Trainer do.

    begin: checkpoint to resume from, read by accelerate's functions.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    for part in (*model.model.layers, model):
        fully_shard(part)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    # With a checkpoint, deliberately wrong settings show that the right ones are read from it.
    settings: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95)} if begin is None else {"lr": 1.0, "betas": (0.0, 0.0)}
    optimizer = torch.optim.AdamW(groups, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    if begin is not None:
        _by_accelerate(begin, model, optimizer, save=False)
    losses = []
    for step in range(SAVED if begin is not None else 0, STEPS):
        batch = rows[step * BATCH : (step + 1) * BATCH]
        tokens = sum(label != -100 for row in batch for label in row["labels"])
        ids = torch.tensor([row["input_ids"] for row in batch[rank::ranks]])
        labels = torch.tensor([row["labels"] for row in batch[rank::ranks]])
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / tokens
        (loss * ranks).backward()  # FSDP averages over the ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
        if step + 1 == SAVED:
            schedule.last_epoch = SAVED
            _save_as_torchtitan(folder, model, optimizer, schedule)
            _by_accelerate(folder / "accelerate", model, optimizer, save=True)
            _by_accelerate(folder / "whole", model, optimizer, save=True, form="FULL_STATE_DICT")
    return losses


def _save_as_torchtitan(folder: Path, model: Any, optimizer: Any, schedule: Any) -> None:
    from torch.distributed.checkpoint import save  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights: Any = get_model_state_dict(model)
    states: Any = get_optimizer_state_dict(model, optimizer, options=options)
    others = {
        "lr_scheduler": schedule.state_dict(),
        "train_state": {"step": torch.tensor(SAVED, dtype=torch.int32), "ntokens_seen": torch.tensor(512)},
        "dataloader": {"dp_rank_0": b"anything"},
    }
    save({**weights, "optimizer": states, **others}, checkpoint_id=str(folder / "flat" / f"step-{SAVED}"))
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in states.items()}
    renamed = {titan_key(key): to_titan(key, value) for key, value in whole.items()}
    named = {titan_key(key): to_titan(key, value.full_tensor()) for key, value in weights.items()}
    save({**named, "optimizer": renamed, **others}, checkpoint_id=str(folder / "titan" / f"step-{SAVED}"))


TITAN = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


QKV = ("q_proj", "k_proj", "v_proj")


def titan_key(key: str) -> str:
    for theirs, titans in TITAN.items():
        key = key.replace(theirs, titans)
    return key


def to_titan(key: str, value: Any) -> Any:
    """torchtitan's Llama rotates adjacent pairs; transformers' rotates elements half a head apart. Reorder the rows."""
    heads = 4 if "q_proj" in key else 2 if "k_proj" in key else 0
    if not heads or not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _by_accelerate(folder: Path, model: Any, optimizer: Any, *, save: bool, form: str = "SHARDED_STATE_DICT") -> None:
    from types import SimpleNamespace

    import torch.distributed as dist
    from accelerate import PartialState, utils

    PartialState(cpu=True)
    plugin = utils.FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=form)
    accelerator: Any = SimpleNamespace(num_processes=dist.get_world_size(), process_index=dist.get_rank())
    accelerator.wait_for_everyone = dist.barrier
    if save:
        utils.save_fsdp_model(plugin, accelerator, model, str(folder))
        utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    else:
        utils.load_fsdp_model(plugin, accelerator, model, str(folder))
        utils.load_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
