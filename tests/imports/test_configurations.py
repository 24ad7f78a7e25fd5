"""Files of other trainers, rewritten small: what each becomes here, and what is said of every field that does not."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.foreign import Fate
from configs.imports.combine import import_files
from configs.imports.deepspeed import follow
from configs.imports.write import as_config, experiment, report
from configs.load import load_config
from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from launch.translated import translate
from tests.support.imported import experiment_of, names, written
from trainer.engine.deepspeed.settings import problems
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

ZERO2 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": False,
        "reduce_bucket_size": 5e6,
        "round_robin_gradients": True,
    },
}
ARGUMENTS = {
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": "2e-5",
    "max_steps": 200,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "gradient_checkpointing": True,
    "deepspeed": "ds.json",
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": 5,
    "full_determinism": True,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 10,
    "report_to": ["none"],
    "dataloader_pin_memory": True,
}
DEFAULTS = {"optimizer.weight_decay": 0.0, "optimizer.beta2": 0.999, "train.seed": 42, "train.timeout_minutes": 30.0}


def test_deepspeed_with_the_trainers_arguments(tmp_path: Path) -> None:
    """The DeepSpeed file is found through the field that names it."""
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


NVME = {"device": "nvme", "nvme_path": "/nvme"}
ZERO = "parallel.deepspeed."
OWN: dict[str, tuple[dict[str, Any], dict[str, Any], set[str], set[str]]] = {
    "stage 2": (
        {
            "zero_optimization": {
                **{"stage": 2, "overlap_comm": True, "allgather_bucket_size": 2e8, "reduce_scatter": False},
                **{"contiguous_gradients": True, "stage3_max_live_parameters": 1e9, "mics_shard_size": 4},
            },
            "aio": {"block_size": 262144},
            "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        },
        {
            f"{ZERO}comms_logger": True,
            f"{ZERO}overlap_comm": True,
            f"{ZERO}allgather_bucket_size": 200_000_000,
            f"{ZERO}reduce_scatter": False,
        },
        {"zero_optimization.contiguous_gradients", "zero_optimization.stage3_max_live_parameters", "aio.block_size"}
        | {"comms_logger.prof_ops"},
        {"zero_optimization.mics_shard_size"},
    ),
    "stage 3": (
        {
            "zero_optimization": {
                **{"stage": 3, "overlap_comm": False, "stage3_max_live_parameters": 1e9, "allgather_bucket_size": 2e8},
                **{"stage3_use_all_reduce_for_fetch_params": True, "stage3_allgather_sequential": False},
                **{"zero_hpz_partition_size": 1, "model_persistence_threshold": 1e6, "zero_quantized_weights": True},
            }
        },
        {
            **{f"{ZERO}overlap_comm": False, f"{ZERO}stage3_max_live_parameters": 10**9},
            **{f"{ZERO}stage3_use_all_reduce_for_fetch_params": True},
            f"{ZERO}stage3_model_persistence_threshold": 10**6,
        },
        {f"zero_optimization.{name}" for name in ("stage3_allgather_sequential", "zero_hpz_partition_size")}
        | {"zero_optimization.allgather_bucket_size"},
        {"zero_optimization.zero_quantized_weights"},
    ),
    "stage 1 in bfloat16, which reads none of them": (
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 2e8}},
        {},
        {"zero_optimization.overlap_comm", "zero_optimization.reduce_bucket_size"},
        set(),
    ),
    "on a disk": (
        {
            "zero_optimization": {
                **{"stage": 3, "offload_optimizer": NVME, "offload_param": NVME, "zero_hpz_partition_size": 8},
                **{"reduce_bucket_size": 2e8, "stage3_max_live_parameters": 1e9},
            },
            "aio": {"block_size": 1048576, "queue_depth": 16, "single_submit": False, "use_gds": True},
        },
        {
            f"{ZERO}reduce_bucket_size": 200_000_000,
            **{f"{ZERO}aio.block_size": 2**20, f"{ZERO}aio.queue_depth": 16, f"{ZERO}aio.single_submit": False},
        },
        set(),
        {f"zero_optimization.{name}" for name in ("zero_hpz_partition_size", "stage3_max_live_parameters")}
        | {"aio.use_gds"},
    ),
    "parameters on a disk": (
        {
            "zero_optimization": {
                **{"stage": 3, "offload_param": NVME, "stage3_prefetch_bucket_size": 5e8},
                **{"stage3_param_persistence_threshold": "auto"},
            },
            "data_types": {"grad_accum_dtype": "bf16"},
        },
        {},
        {"zero_optimization.stage3_param_persistence_threshold"},
        {"zero_optimization.stage3_prefetch_bucket_size", "data_types.grad_accum_dtype"},
    ),
    "gathered one by one": (
        {"zero_optimization": {"stage": 3, "stage3_allgather_sequential": True, "stage3_prefetch_bucket_size": 5e7}},
        {f"{ZERO}stage3_allgather_sequential": True},
        {"zero_optimization.stage3_prefetch_bucket_size"},
        set(),
    ),
    "an offloaded optimizer": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": False}},
        {},
        {"zero_optimization.contiguous_gradients"},
        set(),
    ),
    "a second bucket": (
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": False}},
        {f"{ZERO}overlap_comm": True},
        set(),
        {"zero_optimization.contiguous_gradients"},
    ),
    "FSDP of version 1": (
        {"distributed_type": "FSDP", "fsdp_config": {"fsdp_forward_prefetch": True, "fsdp_sharding_strategy": 1}},
        {"parallel.fsdp.forward_prefetch": 1},
        set(),
        set(),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_settings_of_an_engine_pass_through(tmp_path: Path, name: str) -> None:
    tree, settings, harmless, lost = OWN[name]
    made = import_files(written(tmp_path, ds_json=tree))
    own = (ZERO, "parallel.fsdp.")
    assert {key: value for key, value in made.settings.items() if key.startswith(own)} == settings
    assert harmless <= names(made, Fate.harmless) and lost <= names(made, Fate.lost)
    assert not names(made, Fate.unknown)
    experiment_of(made, tmp_path)  # a configuration that the schema takes
    follow(made.settings, made.compute)
    assert not [*problems(as_config(made))]  # and the plan, with DeepSpeed's own sizes too


def test_stage_1_in_bfloat16_has_no_bucket_whoever_says_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan refuses a bucket there: neither a file's, nor the Trainer's "auto", nor DeepSpeed's default comes in."""
    monkeypatch.chdir(tmp_path)
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto"}
    written(tmp_path, ds_json={"zero_optimization": zero}, args_json={"bf16": True, "deepspeed": "ds.json"})
    written(tmp_path, own_json={"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e8}})
    more = ["model=tiny", "cluster=8xh100", "data.seq_len=32", "estimate.suggest=false"]
    assert memory_estimate(["--from", "ds.json", "--from", "args.json", *more]) == 0
    assert memory_estimate(["--from", "own.json", "precision=bf16", *more]) == 0
    assert "parallel.deepspeed" not in capsys.readouterr().err


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
    assert "train.epochs" not in made.settings  # their default, but the size of a stream is not known
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


FSDP = {"distributed_type": "FSDP", "num_processes": 2, "mixed_precision": "bf16"}
PAGED = {"per_device_train_batch_size": 1, "max_steps": 3, "optim": "paged_adamw_32bit"}
LEFT_OUT = {
    "paging beside accelerate's offload": (
        {"args_json": PAGED, "acc_yaml": {**FSDP, "fsdp_config": {"fsdp_offload_params": True}}},
        ("optim", "optimizer.paged", "parallel.offload.parameters=cpu keeps states in host memory for good"),
    ),
    "paging beside accelerate's DeepSpeed": (
        {"args_json": PAGED, "acc_yaml": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}},
        ("optim", "optimizer.paged", "DeepSpeed makes the states of its partitions itself"),
    ),
    "prefetch where nothing is sharded": (
        {
            "acc_yaml": {
                **FSDP,
                "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD", "fsdp_forward_prefetch": True},
            }
        },
        ("fsdp_config.fsdp_forward_prefetch", "parallel.fsdp.forward_prefetch", "nothing is sharded here"),
    ),
    "a bucket of an odd size": (
        {"ds_json": {"zero_optimization": {"stage": 2, "allgather_bucket_size": 5_000_001}}},
        (
            "zero_optimization.allgather_bucket_size",
            "parallel.deepspeed.allgather_bucket_size",
            "DeepSpeed divides it by two",
        ),
    ),
    "a disk that nothing goes to": (
        {
            "acc_yaml": {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {"zero_stage": 3, "offload_optimizer_nvme_path": "/nvme"},
            }
        },
        (
            "deepspeed_config.offload_optimizer_nvme_path",
            "parallel.offload.nvme_path",
            "nothing is offloaded to nvme",
        ),
    ),
    "packing of a stream, which is packed anyhow": (
        {"args_json": {**PAGED, "optim": "adamw_torch", "dataset_name": "x/y", "packing": True}},
        ("packing", "data.packing", "is for data=chat, this is data=hub"),
    ),
    "compilation under DeepSpeed": (
        {"args_json": {**PAGED, "optim": "adamw_torch", "torch_compile": True}, "ds_json": ZERO2},
        ("torch_compile", "train.compile", "engine torch only"),
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_the_run_would_not_read_is_left_out_and_said(case: str, tmp_path: Path) -> None:
    files, (name, key, rule) = LEFT_OUT[case]
    made = translate(written(tmp_path, **files), [], config_dir=None)
    assert key not in made.settings
    (field,) = (each for each in made.fields if each.name == name)
    assert rule in field.why
    assert key not in experiment_of(made, tmp_path)
    make_plan(as_config(made), Machine(gpus=2))
    assert rule in experiment(made, "command") or field.fate is Fate.translated


def test_paging_stays_where_a_gpu_reads_it(tmp_path: Path) -> None:
    made = translate(written(tmp_path, args_json=PAGED), [], config_dir=None)
    assert made.settings["optimizer.paged"] is True


@pytest.mark.parametrize("size", [0, -5, 1e30])
def test_a_number_out_of_range_is_said_of_the_files_field(size: float, tmp_path: Path) -> None:
    tree = {"zero_optimization": {"stage": 2, "allgather_bucket_size": size}}
    files = written(tmp_path, ds_json=tree)
    with pytest.raises(ConfigError, match=r"ds\.json: zero_optimization\.allgather_bucket_size=.*: here parallel"):
        import_files(files)
    taken = import_files(files, ["parallel.deepspeed.allgather_bucket_size=2"])
    assert taken.settings["parallel.deepspeed.allgather_bucket_size"] == 2


def test_the_optimizer_and_the_scheduler_of_deepspeeds_file_win(tmp_path: Path) -> None:
    """The Trainer makes none of its own beside them; a curve of its own goes as a whole."""
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
    """As in `TrainingArguments.__post_init__`: the environment says it, true bf16 and fp16 win."""
    plain = {"per_device_train_batch_size": 1, "max_steps": 3}
    for more, dtype in (({}, "bfloat16"), ({"bf16": False}, "bfloat16"), ({"fp16": True}, "float16")):
        made = import_files(written(tmp_path, args_json={**plain, **more}, acc_yaml=FSDP))
        assert made.settings["precision.param_dtype"] == dtype


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def arguments_bin(path: Path, tree: Any) -> str:
    """As torch.save writes it: a zip archive with one pickle."""
    stream = io.BytesIO()
    pickle.dump(tree, stream, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", stream.getvalue())
    return str(path)


def test_a_pickle_of_arguments_is_read_and_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What transformers pickles, without transformers: an object of its class, and an enum made of its value.
    content = (
        b"\x80\x02ctransformers.training_args\nTrainingArguments\n)\x81}("
        b"S'learning_rate'\nF0.0001\n"
        b"S'lr_scheduler_type'\nctransformers.trainer_utils\nSchedulerType\n(S'linear'\ntR"
        b"S'_n_gpu'\nK\x01S'distributed_state'\ncaccelerate.state\nPartialState\n)\x81ub."
    )
    with zipfile.ZipFile("training_args.bin", "w") as archive:
        archive.writestr("training_args/data.pkl", content)
    made = import_files(["training_args.bin"])
    assert made.settings["optimizer.lr"] == 1e-4 and made.settings["scheduler.name"] == "linear"
    assert names(made, Fate.harmless) == {"_n_gpu", "distributed_state"}
    with pytest.raises(ConfigError) as refused:
        import_files([arguments_bin(tmp_path / "evil.bin", {"learning_rate": Evil()})])
    (line,) = refused.value.problems
    assert "system, which is refused unread" in line and "to_json_string" in line
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"zero_optimization": {"stage": 2}', "not valid JSON"),
        ("a.json", '{"train_batch_size": 1, "train_batch_size": 2}', "train_batch_size stands in it twice"),
        ("a.json", '{"zero_optimization": {"stage": 7}}', "zero_optimization.stage=7: choose 0, 1, 2, 3"),
        ("a.json", '{"learning_rate": "fast"}', "learning_rate=fast: must be a number"),
        ("a.json", '{"run_name": "${oc.env:HOME}", "bf16": 1}', "run_name=${oc.env:HOME}: must be the value itself"),
        (
            "a.json",
            '{"hidden_size": 64, "vocab_size": 9}',
            "holds hidden_size, vocab_size, which is none of the formats",
        ),
        ("a.yaml", "distributed_type: [\n", "not valid YAML"),
        ("a.yaml", "distributed_type: QUANTUM\n", "distributed_type=QUANTUM: choose NO, MULTI_GPU"),
        ("a.yaml", "", "holds no keys"),
        ("a.json", '{"seed": NaN, "bf16": true}', "seed=nan: here train.seed: must be a whole number"),
        ("a.toml", "[job]\n[parallelism]\npipeline_parallel_degree = []\n", "no value, or not together with the other"),
        ("a.toml", "[training\n", "not valid TOML"),
        ("a.bin", "PK\x03\x04 cut", "not a pickle of arguments"),
        ("missing.json", None, "cannot be read (No such file or directory)"),
    ],
)
def test_bad_files_are_one_line(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as refused:
        import_files([str(tmp_path / name)])
    assert any(said in line for line in refused.value.problems)
    assert all("\n" not in line for line in refused.value.problems)


def test_the_door_writes_an_experiment_and_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ds_json=ZERO2)
    words = ["import", "ds.json", "train.micro_batch_size=2", "precision=bf16", "train.global_batch_size=4"]
    assert launch(words) == 0
    out = capsys.readouterr().out
    assert "memory     not estimated: no file names a model" in out
    assert out.splitlines()[-1] == "run it     python -m launch --config-dir=mine experiment=ds model.path=FOLDER"
    config = load_config(["experiment=ds"], config_dir="mine")
    assert (config.train.micro_batch_size, config.parallel.preset) == (2, "zero2_offload")
    for more, said in (
        ([], "mine/experiment/ds.yaml: exists;"),
        (["--to=elsewhere.yaml"], "--to=elsewhere.yaml: must be FOLDER/experiment/NAME.yaml"),
        (["--to=a/experiment/demo.yaml"], "experiment=demo is an option of this package"),
        (["optimizer.rl=1"], "optimizer.rl=1: no such key; did you mean optimizer.lr?"),
    ):
        assert launch([*words, *more, "--force"] if "rl" in str(more) else [*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert launch([*words, "--force"]) == 0


def test_the_layout_is_called_by_its_stage_and_takes_no_more_along(tmp_path: Path) -> None:
    """Stage 3 with the optimizer alone on the host: our preset that comes closest offloads the parameters too."""
    zero3 = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    }
    made = import_files(written(tmp_path, ds_json=zero3))
    assert "override /parallel: zero3_offload" in experiment(made, "command")
    found = experiment_of(made, tmp_path)
    assert found["parallel.zero_stage"] == 3 and found["parallel.offload.optimizer"] == "cpu"
    assert "parallel.offload.parameters" not in found, "none, as by default"


def test_a_key_stays_in_its_comment(tmp_path: Path) -> None:
    made = import_files(written(tmp_path, ds_json={"zero_optimization": {"stage": 2}, "x\ntrain: {steps: 5}\n#": 1}))
    assert "train.steps" not in experiment_of(made, tmp_path)
    assert "\\n" in report(made)


def test_every_value_is_checked_and_every_override_wins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experiment: an import is an experiment of its own"):
        import_files(written(tmp_path, a_json=ARGUMENTS), ["experiment=demo"])
    part = {**ARGUMENTS, "deepspeed": None, "eval_strategy": "steps", "logging_steps": 0.1, "warmup_ratio": 0.0}
    made = import_files(written(tmp_path, b_json=part))
    assert "eval_strategy" in names(made, Fate.lost)
    sharded = {"per_device_train_batch_size": 1, "fsdp": "hybrid_shard auto_wrap", "max_steps": 3}
    assert "fsdp" in names(import_files(written(tmp_path, c_json=sharded)), Fate.lost)


def test_what_chooses_among_validations_needs_some(tmp_path: Path) -> None:
    best = {
        "per_device_train_batch_size": 1,
        "max_steps": 9,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    made = import_files(written(tmp_path, a_json={**best, "eval_strategy": "steps", "eval_steps": 5}))
    assert experiment_of(made, tmp_path)["checkpoint.best"] is True
    assert not made.of(Fate.lost)
    made = import_files(written(tmp_path, b_json={**best, "eval_strategy": "epoch", "save_strategy": "best"}))
    assert names(made, Fate.lost) == {"eval_strategy", "load_best_model_at_end", "save_strategy"}
    counted = {"base_model": "x/y", "val_set_size": 0.1, "max_steps": 9, "early_stopping_patience": 2, "eval_steps": 3}
    made = import_files(written(tmp_path, c_yaml=counted))
    assert experiment_of(made, tmp_path)["train.patience"] == 2


def test_an_experiment_goes_into_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, a_json={"per_device_train_batch_size": 1, "max_steps": 3})
    many = f"data.paths=[{','.join(f'file{n}.jsonl' for n in range(40))}]"
    assert launch(["import", "a.json", many, "--to=a.json/experiment/x.yaml"]) == 2
    assert "--to=a.json/experiment/x.yaml: cannot be written" in capsys.readouterr().err


def test_what_the_plan_refuses_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ds_json=ZERO2, args_json={**ARGUMENTS, "optim": "adamw_8bit"})
    for _ in range(2):
        assert launch(["import", "args.json", "ds.json", "model=tiny", "cluster=8xh100"]) == 2
        assert capsys.readouterr().err.startswith("optimizer.name=adamw_8bit: ")
    assert not (tmp_path / "mine").exists()
