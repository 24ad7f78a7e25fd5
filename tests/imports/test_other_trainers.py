"""torchtitan's, axolotl's and LLaMA-Factory's files, rewritten small; and what was imported trains."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.foreign import Fate
from configs.imports.combine import import_files
from configs.imports.deepspeed import SIZES
from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from launch.their_libraries import checked
from tests.support.doors import door
from tests.support.harness import run_ranks
from tests.support.imported import ARGUMENTS, ZERO2, experiment_of, names, written

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
SMALL_TITAN = """
[training]
local_batch_size = 2
steps = 1000
dataset = "c4_test"
[optimizer]
lr = 1e-3
[parallelism]
data_parallel_shard_degree = -1
[activation_checkpoint]
mode = "full"
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


CONVERSATIONS = {
    "sharegpt": (
        {
            "path": "chats.json",
            "type": "chat_template",
            "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["human", "customer"], "assistant": ["gpt"], "system": ["system"]},
            "roles_to_train": ["assistant", "tool"],
            "train_on_eos": "turn",
        },
        {
            "data.paths": ["chats.json"],
            "data.messages_key": "conversations",
            "data.roles": {"human": "user", "customer": "user", "gpt": "assistant"},
            "data.train_roles": ["assistant", "tool"],
        },
        set(),
    ),
    "names": (
        {
            "path": "chats.jsonl.gz",
            "type": "chat_template",
            "message_field_role": "who",
            "message_property_mappings": {"content": "text"},
            "field_tools": "functions",
            "train_on_eos": "last",
        },
        {
            "data.paths": ["chats.jsonl.gz"],
            "data.fields": {"role": "who", "content": "text", "tools": "functions"},
        },
        {"datasets[0].train_on_eos"},
    ),
    "alpaca": ({"path": "a.csv", "type": "alpaca"}, {"data.paths": ["a.csv"]}, set()),
    "files": (
        {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "chat_template"},
        {"data.paths": ["a.jsonl", "b.jsonl"]},
        set(),
    ),
    "custom": (
        {"path": "a.json", "type": {"field_instruction": "question", "field_output": "answer"}},
        {"data.paths": ["a.json"], "data.fields": {"instruction": "question", "output": "answer"}},
        set(),
    ),
    "a prompt of its own": (
        {"path": "a.json", "type": {"field_instruction": "q", "field_output": "output", "format": "Q: {instruction}"}},
        {"data.paths": ["a.json"]},
        {"datasets[0].type"},
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_axolotl(tmp_path: Path, name: str) -> None:
    dataset, expected, lost = CONVERSATIONS[name]
    files = written(tmp_path, run_yaml={"base_model": "a/b", "max_steps": 2, "datasets": [dataset]})
    made = import_files(files)
    found = {key: value for key, value in experiment_of(made, tmp_path).items() if key.startswith("data.")}
    assert {**found, "data.seq_len": 0} == {"data.source": "chat", **expected, "data.seq_len": 0}
    assert {each for each in names(made, Fate.lost) if each.startswith("datasets")} == lost


def test_the_data_sets_of_llama_factory(tmp_path: Path) -> None:
    columns = {"messages": "turns", "tools": "functions"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "model"}
    described = {
        "mine": {"file_name": "mine.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "more": {"file_name": "more.json", "formatting": "sharegpt", "columns": columns, "tags": tags},
        "alpaca": {
            "file_name": "alpaca.json",
            "columns": {"prompt": "instruction", "query": "context", "response": "r"},
        },
        "pairs": {"file_name": "pairs.json", "ranking": True},
        "far": {"hf_hub_url": "somebody/far", "subset": "big", "formatting": "sharegpt", "columns": columns},
        "some": {
            "file_name": "some.json",
            "formatting": "sharegpt",
            "num_samples": 9,
            "tags": {"system_tag": "rules", "function_tag": "call"},
        },
    }
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(described))
    run = {"model_name_or_path": "a/b", "stage": "sft", "max_steps": 2, "dataset_dir": "sets", "template": "qwen"}

    def data(**more: object) -> dict[str, object]:
        made = import_files(written(tmp_path, run_yaml={**run, **more}))
        found = experiment_of(made, tmp_path)
        return {key: value for key, value in found.items() if key.startswith("data.") and key != "data.seq_len"}

    assert data(dataset="mine, more", train_on_prompt=True) == {
        "data.source": "chat",
        "data.paths": [str(tmp_path / "sets" / "mine.json"), str(tmp_path / "sets" / "more.json")],
        "data.messages_key": "turns",
        "data.fields": {"tools": "functions"},
        "data.roles": {"model": "assistant"},
        "data.train_roles": ["system", "user", "assistant", "tool"],
    }
    assert data(dataset="alpaca")["data.fields"] == {"input": "context", "output": "r"}
    assert data(dataset="far").items() >= {"data.name": "somebody/far", "data.subset": "big"}.items()
    assert data(dataset="far, mine")["data.mixture"]["far"]["name"] == "somebody/far"  # pyright: ignore
    assert not {"data.paths", "data.source"} & data(dataset="pairs").keys()
    assert not {"data.paths", "data.source"} & data(dataset="alpaca,mine").keys()
    assert data(dataset="some")["data.roles"] == {"rules": "system"}
    made = import_files(written(tmp_path, run_yaml={**run, "dataset": "some"}))
    assert {"some.num_samples", "some.tags.function_tag"} < names(made, Fate.lost)


SMALL = ["model=tiny", "data=synthetic", "data.seq_len=32", "train.steps=2", "cluster=cpu", "cluster.gpus_per_node=2"]


def test_what_the_door_imported_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's file with the Trainer's arguments: the experiment, the memory it takes, two steps on two ranks."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ds_json=ZERO2, args_json=ARGUMENTS)
    assert launch(["import", "ds.json", "args.json", *SMALL, "train.run_dir=run"]) == 0
    out = capsys.readouterr().out
    assert "memory     0.0 GiB per GPU predicted" in out
    assert f"checked    ds.json: deepspeed {version('deepspeed')} reads it" in out
    files = written(
        tmp_path,
        ds_json={"zero_optimization": {"stage": 3, "stage4_x": 1}},
        accelerate_yaml={"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "extra": 1},
    )
    refused = [line for file in files for line in checked(import_files([file]))]
    assert refused[0].endswith("refuses zero_optimization.stage4_x (Extra inputs are not permitted)")
    assert "unknown keys (['extra'])" in refused[1]
    check_run(tmp_path, "ds", "zero2_offload")


def test_what_was_imported_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = import_files(written(tmp_path, run_toml=SMALL_TITAN), [*SMALL, "train.run_dir=run"])
    experiment_of(made, tmp_path)
    check_run(tmp_path, "it", "fsdp")


def check_run(folder: Path, name: str, layout: str) -> None:
    assert run_ranks(
        2, door, [f"--config-dir={folder / 'mine'}", f"experiment={name}", f"train.run_dir={folder / 'run'}"]
    ) == [0, 0]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert any(row["kind"] == "step" and row["loss"] > 0 for row in rows)
    assert f"preset: {layout}" in (folder / "run/config.yaml").read_text()


HIDDEN = ("stage3_param_persistence_threshold",)


def test_an_estimate_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answer as for our own overrides, with what it had to assume."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ds_json=ZERO2, args_json=ARGUMENTS)
    named = ["--from", "ds.json", "--from", "args.json"]
    more = ["model=tiny", "cluster=8xh100", "data.seq_len=32", "estimate.suggest=false", "estimate.format=json"]
    assert memory_estimate([*named, *more]) == 0
    theirs = capsys.readouterr()
    ours = [
        "parallel=zero2_offload",
        "precision=bf16",
        "train.micro_batch_size=2",
        "train.gradient_accumulation_steps=4",
    ]
    assert memory_estimate([*ours, "train.activation_checkpointing=full", *more]) == 0
    wanted = json.loads(capsys.readouterr().out)
    found = json.loads(theirs.out)
    assert found["device_bytes"] == wanted["device_bytes"] > 0
    lines = theirs.err.splitlines()
    assert [line for line in lines if line.startswith("assumed")] == [
        "assumed    float32 master weights and optimizer states: the Trainer keeps both in the dtype that the model was"
        " loaded in, which may be 16 bits"
    ]
    assert "parallel.deepspeed" not in theirs.err  # the file gives what stage 2 reads
    assert any(line.startswith("not followed   zero_optimization.round_robin_gradients=true: ") for line in lines)
    assert memory_estimate([*named, "-m"]) == 2
    assert "--from: the files describe one configuration; leave out -m" in capsys.readouterr().err
    assert memory_estimate([*named, "estimate.search=true"]) == 2
    assert "--from: estimate.search needs overrides" in capsys.readouterr().err
    adam = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    automatic = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", *HIDDEN), "auto")
    written(tmp_path, ds_json={"optimizer": adam, "zero_optimization": {"stage": 3, **automatic}})
    assert memory_estimate([*named, *more]) == 0
    found = _sizes(capsys.readouterr().out)
    hidden = 128  # of model=tiny
    assert found == {
        **SIZES,
        "reduce_bucket_size": hidden**2,
        "stage3_prefetch_bucket_size": 14745,
        HIDDEN[0]: 10 * hidden,
    }
    written(tmp_path, ds_json={"zero_optimization": {"stage": 3}})
    assert memory_estimate(["--from", "ds.json", *more]) == 0
    theirs = capsys.readouterr()
    assert "assumed    parallel.deepspeed.stage3_max_reuse_distance=1e+09, which is DeepSpeed's default" in theirs.err
    assert _sizes(theirs.out) == SIZES
    # DeepSpeed adds gradients up in the dtype of the parameters unless the file says another.
    for given, gradients in (({}, "bfloat16"), ({"data_types": {"grad_accum_dtype": "fp32"}}, "float32")):
        written(tmp_path, ds_json={"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, **given})
        assert memory_estimate(["--from", "ds.json", *more]) == 0
        asked = json.loads(capsys.readouterr().out)["config"]["parallel"]["deepspeed"]["grad_accum_dtype"]
        assert asked == gradients


def _sizes(said: str) -> dict[str, Any]:
    own = json.loads(said)["config"]["parallel"]["deepspeed"]
    return {name: value for name, value in own.items() if type(value) is int}


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
    """transformers takes a `warmup_steps` below 1 for a part of all steps."""
    arguments = {"output_dir": "out", "num_train_epochs": 2.5, "warmup_steps": 0.2}
    made = import_files(written(tmp_path, args_json=arguments), overrides)
    keys = ("train.steps", "train.epochs", "scheduler.warmup_steps", "scheduler.warmup_ratio")
    assert {key: made.settings[key] for key in keys if key in made.settings} == expected
    lost = {"num_train_epochs"} if "data=hub" in overrides else set()
    assert names(made, Fate.lost) == lost


def test_several_data_sets_become_a_mixture(tmp_path: Path) -> None:
    """axolotl shuffles its data sets together; LLaMA-Factory does too, or interleaves them by probabilities."""
    sets = [
        {"path": "a/chats.jsonl", "type": "chat_template", "field_messages": "talk"},
        {"path": "b/chats.jsonl", "type": "chat_template"},
        {"path": "books.txt", "type": "completion"},
    ]
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump({"base_model": "x", "datasets": sets})))
    mixture = {
        "chats": {"source": "chat", "paths": ["a/chats.jsonl"], "messages_key": "talk"},
        "chats-2": {"source": "chat", "paths": ["b/chats.jsonl"]},
        "books": {"source": "files", "paths": ["books.txt"]},
    }
    assert experiment_of(made, tmp_path)["data.mixture"] == mixture
    alike = {"base_model": "x", "datasets": [{**sets[1], "path": f"{name}.jsonl"} for name in "ab"]}
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump(alike)))
    assert made.settings["data.paths"] == ["a.jsonl", "b.jsonl"]
    assert "data.mixture" not in made.settings
    (tmp_path / "data").mkdir()
    known = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.jsonl"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(known))
    factory = {"model_name_or_path": "x", "stage": "sft", "dataset": "a, b", "dataset_dir": "data"}
    factory |= {"mix_strategy": "interleave_under", "interleave_probs": "0.7, 0.3"}
    made = import_files(written(tmp_path, run_yaml=yaml.safe_dump(factory)))
    assert {name: source["weight"] for name, source in made.settings["data.mixture"].items()} == {"a": 0.7, "b": 0.3}
    assert made.settings["data.exhausted"] == "stop"


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
