"""`cookbook import` and `memory-estimate --from`: bad files, overrides, and the written experiment file."""

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
from configs.imports.write import experiment, report
from configs.load import load_config
from launch.__main__ import main as launch
from tests.support.imported import ARGUMENTS, ZERO2, experiment_of, names, written


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch executed",)


def arguments_bin(path: Path, tree: Any) -> str:
    """Write a file like torch.save, a zip archive with one pickle, and return its path."""
    stream = io.BytesIO()
    pickle.dump(tree, stream, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("training_args/data.pkl", stream.getvalue())
    return str(path)


def test_a_pickle_of_arguments_is_read_and_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # This is the pickle of transformers, made without it: an object of its class, and an enum made from its value.
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


def test_the_entry_point_writes_an_experiment_and_replaces_none(
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
    """Stage 3 offloads only the optimizer here; the closest preset offloads the parameters too, which must not carry
    over."""
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
