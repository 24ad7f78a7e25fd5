"""Small versions of other trainers' files: the resulting settings, and the report on fields without a setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.foreign import Fate
from configs.imports.combine import import_files
from configs.imports.write import report
from tests.support.imported import ARGUMENTS, FSDP, ZERO2, experiment_of, names, written

DEFAULTS = {"optimizer.weight_decay": 0.0, "optimizer.beta2": 0.999, "train.seed": 42, "train.timeout_minutes": 30.0}


def test_deepspeed_with_the_trainers_arguments(tmp_path: Path) -> None:
    """The DeepSpeed file is found through the field that refers to it."""
    _, args = written(tmp_path, ds_json=ZERO2, args_json=ARGUMENTS)
    made = import_files([args])
    assert experiment_of(made, tmp_path) == {
        **DEFAULTS,
        "train.run_dir": "out",
        "train.steps": 200,
        "train.micro_batch_size": 2,
        "train.gradient_accumulation_steps": 4,
        "train.activation_checkpointing": "full",
        "train.neftune_alpha": 5,
        "optimizer.lr": 2e-5,
        "scheduler.warmup_ratio": 0.03,
        "scheduler.min_lr_ratio": 0.0,
        "checkpoint.every": 100,
        "logging.every": 10,
        "precision.preset": "bf16",
        "precision.param_dtype": "bfloat16",
        "parallel.preset": "zero2_offload",
        "parallel.engine": "deepspeed",
        "parallel.zero_stage": 2,
        "parallel.dp_shard": None,
        "parallel.offload.optimizer": "cpu",
        "parallel.deepspeed.reduce_bucket_size": 5_000_000,
    }
    section = "zero_optimization"
    assert names(made, Fate.lost) == {
        "full_determinism",
        f"{section}.round_robin_gradients",
    }
    assert not names(made, Fate.unknown)
    assert names(made, Fate.harmless) == {
        *("deepspeed", "save_strategy", "report_to", "dataloader_pin_memory"),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_allow_untested_optimizer", "fp16.enabled", "fp16.loss_scale", "fp16.min_loss_scale", "bf16.enabled"),
        f"{section}.overlap_comm",
    }
    text = report(made)
    fields = [each for each in made.fields if each.given]
    assert len(fields) == len(ARGUMENTS) + 16 and all(each.name in text for each in fields)


def test_deepspeed_alone_says_what_auto_lacks(tmp_path: Path) -> None:
    tree = {
        **ZERO2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.98], "weight_decay": 0.01}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"total_num_steps": 50, "warmup_max_lr": 2e-4, "warmup_num_steps": 5},
        },
        "zero_optimization": {
            "stage": 3,
            "zero_hpz_partition_size": 8,
            "overlap_comm": True,
            "stage3_frobnicate": 1,
            "stage3_param_persistence_threshold": 1e4,
            "sub_group_size": 1e7,
            "stage3_prefetch_bucket_size": "auto",
        },
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "train_micro_batch_size_per_gpu": 4,
    }
    made = import_files(written(tmp_path, ds_json=tree), ["precision=bf16", "cluster=8xh100"])
    assert made.options == {"precision": "bf16", "cluster": "8xh100"}
    assert {
        "optimizer.lr": 2e-4,
        "optimizer.beta2": 0.98,
        "optimizer.weight_decay": 0.01,
        "scheduler.name": "linear",
        "scheduler.min_lr_ratio": 0.0,
        "scheduler.warmup_steps": 5,
        "train.steps": 50,
        "train.micro_batch_size": 4,
        "parallel.zero_stage": 3,
        "parallel.deepspeed.stage3_param_persistence_threshold": 10_000,
        "parallel.deepspeed.sub_group_size": 10_000_000,
        "parallel.deepspeed.zero_hpz_partition_size": 8,
    }.items() <= made.settings.items()
    assert names(made, Fate.unknown) == {"zero_optimization.stage3_frobnicate"}
    lost = {each.name: each.why for each in made.fields if each.fate is Fate.lost}
    assert lost.keys() == {
        *("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "fp16.enabled", "bf16.enabled"),
        *("scheduler.params.warmup_type", "zero_optimization.stage3_prefetch_bucket_size"),
    }
    assert "train.clip_grad_norm" in lost["gradient_clipping"]
    assert [line.partition(":")[0] for line in made.assumed] == [
        "the model",
        "data.seq_len=256 tokens per sequence; give data.seq_len=N",
    ]


def test_an_older_trainers_fsdp_and_scripts_arguments(tmp_path: Path) -> None:
    tree = {
        "model_name_or_path": "meta-llama/Llama-3.1-8B",
        "dataset_name": "HuggingFaceFW/fineweb-edu",
        "block_size": 4096,
        "fsdp": "shard_grad_op auto_wrap offload",
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "xla": False,
            "limit_all_gathers": True,
            "frob": 1,
        },
        "optim": "paged_adamw_8bit",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 5e-6},
        "evaluation_strategy": "epoch",
        "hub_token": "hf_secret",
        "use_peft": True,
        "lora_target_modules": ["q_proj"],
        "frobnicate": {"deep": [1]},
    }
    made = import_files(written(tmp_path, args_yaml=tree))
    assert {
        "model.path": "meta-llama/Llama-3.1-8B",
        "model.weights": "pretrained",
        "data.source": "hub",
        "data.name": "HuggingFaceFW/fineweb-edu",
        "data.seq_len": 4096,
        "parallel.dp_shard": None,
        "parallel.reshard_after_forward": False,
        "parallel.offload.parameters": "cpu",
        "optimizer.name": "adamw_8bit",
        "scheduler.name": "cosine",
        "scheduler.min_lr_ratio": pytest.approx(0.1),
        "tuning.method": "lora",
        "tuning.target_modules": ["q_proj"],
    }.items() <= made.settings.items()
    assert not {"parallel.dp_replicate", "optimizer.paged"} & made.settings.keys()
    assert import_files(written(tmp_path, args_yaml={**tree, "fsdp": "full_shard"})).settings["optimizer.paged"]
    assert names(made, Fate.unknown) == {"frobnicate.deep", "fsdp_config.frob"}
    assert names(made, Fate.lost) == {"evaluation_strategy"}
    assert "train.epochs" not in made.settings  # the Trainer's default is dropped: a stream's size is unknown
    assert "hf_secret" not in report(made)


def test_files_that_contradict_each_other_are_refused_unless_an_override_decides(tmp_path: Path) -> None:
    files = written(
        tmp_path, ds_json={**ZERO2, "gradient_clipping": 0.5}, args_json={**ARGUMENTS, "max_grad_norm": 1.0}
    )
    with pytest.raises(ConfigError) as refused:
        import_files(files)
    (line,) = refused.value.problems
    assert "gradient_clipping=0.5" in line and "max_grad_norm=1.0" in line and "train.clip_grad_norm=VALUE" in line
    assert import_files(files, ["train.clip_grad_norm=2"]).settings["train.clip_grad_norm"] == 2


@pytest.mark.parametrize("size", [0, -5, 1e30])
def test_a_number_out_of_range_is_said_of_the_files_field(size: float, tmp_path: Path) -> None:
    tree = {"zero_optimization": {"stage": 2, "allgather_bucket_size": size}}
    files = written(tmp_path, ds_json=tree)
    with pytest.raises(ConfigError, match=r"ds\.json: zero_optimization\.allgather_bucket_size=.*: here parallel"):
        import_files(files)
    taken = import_files(files, ["parallel.deepspeed.allgather_bucket_size=2"])
    assert taken.settings["parallel.deepspeed.allgather_bucket_size"] == 2


def test_the_optimizer_and_the_scheduler_of_deepspeeds_file_win(tmp_path: Path) -> None:
    """DeepSpeed's scheduler replaces the Trainer's curve as a whole; the Trainer adds nothing to it."""
    own = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    tree = {**ARGUMENTS, "optim": "adafactor", "lr_scheduler_type": "linear"}
    made = import_files(written(tmp_path, args_json=tree, ds_json={**ZERO2, **own}))
    assert made.settings["scheduler.name"] == "constant" and made.settings["optimizer.name"] == "adamw"
    assert "scheduler.min_lr_ratio" not in made.settings
    assert {"optim", "lr_scheduler_type"} <= names(made, Fate.harmless)
    cosine = {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.1, "total_num_steps": 200}}
    for curve in ("linear", "cosine"):
        mixed = {**tree, "lr_scheduler_type": curve}
        made = import_files(written(tmp_path, args_json=mixed, ds_json={**ZERO2, **own, "scheduler": cosine}))
        assert (made.settings["scheduler.name"], made.settings["scheduler.min_lr_ratio"]) == ("cosine", 0.1)
    alone = import_files(written(tmp_path, args_json=tree, ds_json=ZERO2))
    assert (alone.settings["scheduler.name"], alone.settings["scheduler.min_lr_ratio"]) == ("linear", 0.0)


def test_a_size_may_be_a_text(tmp_path: Path) -> None:
    made = import_files(written(tmp_path, ds_json={"zero_optimization": {"stage": 2, "allgather_bucket_size": "1e8"}}))
    assert made.settings["parallel.deepspeed.allgather_bucket_size"] == 10**8


def test_the_launchers_16_bits_count_where_the_trainer_says_none(tmp_path: Path) -> None:
    """As in `TrainingArguments.__post_init__`, the environment sets the dtype unless bf16 or fp16 is true."""
    plain = {"per_device_train_batch_size": 1, "max_steps": 3}
    for more, dtype in (({}, "bfloat16"), ({"bf16": False}, "bfloat16"), ({"fp16": True}, "float16")):
        made = import_files(written(tmp_path, args_json={**plain, **more}, acc_yaml=FSDP))
        assert made.settings["precision.param_dtype"] == dtype
