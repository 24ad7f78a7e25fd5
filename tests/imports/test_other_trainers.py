"""Small versions of torchtitan's, axolotl's and LLaMA-Factory's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.foreign import Fate
from configs.imports.combine import import_files
from tests.support.imported import experiment_of, names, written

TITAN = """
[job]
description = "a run"
[metrics]
log_freq = 5
enable_tensorboard = true
[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "assets/Llama-3.1-8B"
converters = ["float8"]
[optimizer]
name = "AdamW"
lr = 3e-4
[lr_scheduler]
warmup_steps = 10
decay_ratio = 0.2
[training]
local_batch_size = 4
seq_len = 8192
steps = 100
dataset = "c4"
made_up = 1
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "Interleaved1F1B"
context_parallel_degree = 1
context_parallel_rotate_method = "alltoall"
enable_async_tensor_parallel = true
[checkpoint]
enable = true
interval = 50
keep_latest_k = 3
async_mode = "async"
[activation_checkpoint]
mode = "selective"
selective_ac_option = "2"
[quantize.linear.float8]
recipe_name = "rowwise"
filter_fqns = ["output"]
[validation]
enable = false
freq = 500
"""
AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: LlamaForCausalLM
load_in_4bit: true
datasets:
  - path: chats.jsonl
    type: chat_template
    field_messages: conversations
  - path: somebody/alpaca
    type: alpaca
val_set_size: 0
sequence_len: 4096
sample_packing: true
adapter: lora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
max_steps: 300
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
special_tokens:
  pad_token: <|end_of_text|>
fsdp: [full_shard, auto_wrap]
fsdp_config:
  fsdp_state_dict_type: FULL_STATE_DICT
frobnicate: true
"""
FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: identity
template: qwen3
cutoff_len: 1024
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
neat_packing: true
"""


def test_torchtitan(tmp_path: Path) -> None:
    made = import_files(written(tmp_path, run_toml=TITAN), ["cluster=8xh100"])
    found = experiment_of(made, tmp_path)
    assert {
        key: value for key, value in found.items() if not key.startswith(("model.", "cluster.", "parallel.preset"))
    } == {
        "data.tokenizer": "assets/Llama-3.1-8B",
        "data.source": "hub",
        "data.name": "allenai/c4",
        "data.subset": "en",
        "data.seq_len": 8192,
        "parallel.dp_shard": None,
        "parallel.tp": 2,
        "parallel.pp": 2,
        "parallel.sequence_parallel": True,
        "parallel.pipeline.schedule": "interleaved_1f1b",
        "precision.preset": "fp8",
        "precision.param_dtype": "bfloat16",
        "precision.float8.recipe": "rowwise",
        "precision.float8.exclude": ["output"],
        "scheduler.name": "warmup_stable_decay",
        "scheduler.warmup_steps": 10,
        "scheduler.decay_steps": 20,
        "scheduler.min_lr_ratio": 0.0,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": 4,
        "train.activation_checkpointing": "selective",
        "train.eval_samples": 0,
        "train.timeout_minutes": pytest.approx(100 / 60),
        "checkpoint.every": 50,
        "checkpoint.keep_last": 3,
        "checkpoint.async_save": True,
        "logging.tracker": "tensorboard",
        "logging.every": 5,
    }
    assert found["model.preset"] == "llama3_1_8b"
    assert names(made, Fate.unknown) == {"training.made_up"}
    assert names(made, Fate.lost) == {
        "parallelism.enable_async_tensor_parallel",
        "activation_checkpoint.selective_ac_option",
    }
    assert names(made, Fate.harmless) == {
        *("job.description", "model.name", "parallelism.context_parallel_rotate_method"),
        *("validation.freq", "model.converters", "checkpoint.enable"),
    }


def test_axolotl(tmp_path: Path) -> None:
    made = import_files(written(tmp_path, run_yaml=AXOLOTL))
    assert experiment_of(made, tmp_path) == {
        "model.path": "NousResearch/Meta-Llama-3-8B",
        "model.weights": "pretrained",
        "data.mixture": {
            "chats": {"source": "chat", "paths": ["chats.jsonl"], "messages_key": "conversations"},
            "alpaca": {"source": "chat", "name": "somebody/alpaca"},
        },
        "data.seq_len": 4096,
        "data.packing": True,
        "parallel.preset": "fsdp",
        "parallel.dp_shard": None,
        "parallel.reshard_after_forward": True,
        "precision.preset": "bf16",
        "precision.param_dtype": "bfloat16",
        "tuning.method": "qlora",
        "tuning.rank": 32,
        "tuning.alpha": 16.0,
        "optimizer.name": "adamw_8bit",
        "optimizer.lr": 2e-4,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.0,
        "scheduler.warmup_ratio": 0.03,
        "scheduler.min_lr_ratio": 0.0,
        "train.steps": 300,
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 4,
        "train.activation_checkpointing": "full",
        "train.eval_samples": 0,
        "train.seed": 42,
        "train.timeout_minutes": 30.0,
    }
    assert names(made, Fate.unknown) == {"frobnicate"}
    assert names(made, Fate.lost) == {"special_tokens.pad_token"}


def test_llama_factory(tmp_path: Path) -> None:
    made = import_files(written(tmp_path, run_yaml=FACTORY), ["train.steps=50"])
    assert experiment_of(made, tmp_path) == {
        "model.path": "Qwen/Qwen3-4B",
        "model.weights": "pretrained",
        "data.seq_len": 1024,
        "data.packing": True,
        "data.document_mask": True,
        "parallel.preset": "ddp",
        "parallel.dp_replicate": None,
        "precision.preset": "bf16",
        "precision.param_dtype": "bfloat16",
        "tuning.method": "lora",
        "tuning.rank": 8,
        "tuning.alpha": 16.0,
        "optimizer.lr": 1e-4,
        "optimizer.beta2": 0.999,
        "optimizer.weight_decay": 0.0,
        "scheduler.warmup_ratio": 0.1,
        "scheduler.min_lr_ratio": 0.0,
        "train.steps": 50,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation_steps": 8,
        "train.activation_checkpointing": "full",
        "train.eval_samples": 0,
        "train.seed": 42,
        "train.timeout_minutes": 100_000,
        "logging.every": 500,
    }
    assert names(made, Fate.lost) == {"trust_remote_code", "dataset", "template"}
    assert not names(made, Fate.unknown)


def test_the_texts_that_axolotl_writes(tmp_path: Path) -> None:
    run: dict[str, Any] = {"base_model": "a/b", "max_steps": 2, "val_set_size": 0.1, "generation_top_p": 0.9}
    made = import_files(written(tmp_path, run_yaml={**run, "generate_samples": True, "generation_max_new_tokens": 20}))
    settings = experiment_of(made, tmp_path)
    found = {key: value for key, value in settings.items() if key.startswith("train.samples.")}
    assert found == {
        "train.samples.from_validation": 3,
        "train.samples.tokens": 20,
        "train.samples.temperature": 0.7,
    }
    assert names(made, Fate.lost) == {"generation_top_p"}
    made = import_files(written(tmp_path, run_yaml={**run, "eval_table_size": 5}))
    assert experiment_of(made, tmp_path)["train.samples.from_validation"] == 5
    made = import_files(written(tmp_path, run_yaml={**run, "generate_samples": True, "val_set_size": 0}))
    assert "generate_samples" in names(made, Fate.lost)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"train.epochs": 2.5, "scheduler.warmup_ratio": 0.2}),
        (["train.steps=40"], {"train.steps": 40, "scheduler.warmup_ratio": 0.2}),
        (["data=hub", "data.name=x"], {"scheduler.warmup_ratio": 0.2}),
        (["train.epochs=1", "scheduler.warmup_steps=9"], {"train.epochs": 1.0, "scheduler.warmup_steps": 9}),
    ],
)
def test_epochs_and_a_part_of_the_warmup(tmp_path: Path, overrides: list[str], expected: dict[str, Any]) -> None:
    """transformers reads a `warmup_steps` below 1 as a fraction of all steps."""
    arguments = {"output_dir": "out", "num_train_epochs": 2.5, "warmup_steps": 0.2}
    made = import_files(written(tmp_path, args_json=arguments), overrides)
    keys = ("train.steps", "train.epochs", "scheduler.warmup_steps", "scheduler.warmup_ratio")
    assert {key: made.settings[key] for key in keys if key in made.settings} == expected
    lost = {"num_train_epochs"} if "data=hub" in overrides else set()
    assert names(made, Fate.lost) == lost


@pytest.mark.parametrize("warmup", [2, 9])
def test_a_decay_begins_after_the_warmup(warmup: int, tmp_path: Path) -> None:
    tree = f"""
[training]
steps = 4
local_batch_size = 1
[lr_scheduler]
decay_ratio = 0.8
warmup_steps = {warmup}
"""
    made = import_files(written(tmp_path, titan_toml=tree))
    found = made.settings["scheduler.warmup_steps"], made.settings["scheduler.decay_steps"]
    assert found == (min(warmup, 4), 4 - min(warmup, 4))
