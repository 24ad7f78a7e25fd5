"""Imported configurations train, and their memory is estimated."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from configs.imports.combine import import_files
from configs.imports.deepspeed import SIZES
from launch.__main__ import main as launch
from launch.estimate import main as memory_estimate
from launch.their_libraries import checked
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from tests.support.imported import ARGUMENTS, ZERO2, experiment_of, written

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
SMALL = ["model=tiny", "data=synthetic", "data.seq_len=32", "train.steps=2", "cluster=cpu", "cluster.gpus_per_node=2"]


def test_what_the_entry_point_imported_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of DeepSpeed and the Trainer become an experiment; its memory is predicted, and two ranks train it."""
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
        2, run_trainer, [f"--config-dir={folder / 'mine'}", f"experiment={name}", f"train.run_dir={folder / 'run'}"]
    ) == [0, 0]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert any(row["kind"] == "step" and row["loss"] > 0 for row in rows)
    assert f"preset: {layout}" in (folder / "run/config.yaml").read_text()


HIDDEN = ("stage3_param_persistence_threshold",)


def test_an_estimate_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The estimate equals that of our own overrides, and lists its assumptions."""
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
    assert "parallel.deepspeed" not in theirs.err  # the file sets every size that stage 2 reads
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
    # DeepSpeed accumulates gradients in the dtype of the parameters unless the file sets another.
    for given, gradients in (({}, "bfloat16"), ({"data_types": {"grad_accum_dtype": "fp32"}}, "float32")):
        written(tmp_path, ds_json={"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, **given})
        assert memory_estimate(["--from", "ds.json", *more]) == 0
        asked = json.loads(capsys.readouterr().out)["config"]["parallel"]["deepspeed"]["grad_accum_dtype"]
        assert asked == gradients


def _sizes(said: str) -> dict[str, Any]:
    own = json.loads(said)["config"]["parallel"]["deepspeed"]
    return {name: value for name, value in own.items() if type(value) is int}
