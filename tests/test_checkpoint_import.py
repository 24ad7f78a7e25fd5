"""A run resumes from another trainer's checkpoint with its next losses and its moments, or the import is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.disks import small_disk
from tests.support.foreign_trainers import (
    BATCH,
    SAVED,
    STEPS,
    overrides,
    samples,
    save_model,
    train_by_fsdp,
    train_by_transformers,
)
from tests.support.harness import run_ranks
from tests.support.small_hub import small_hub
from tests.test_checkpoint_run import start_and_listen
from trainer.__main__ import main as train
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name

SAME = 2e-6
"""Relative tolerance of float32 losses."""


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}


def heard(ranks: int, words: list[str], expected: int = 0) -> str:
    """Returns the stderr of a run's rank 0."""
    results = run_ranks(ranks, start_and_listen, words)
    assert [code for code, _ in results] == [expected] * ranks
    return "\n".join(results[0][1])


class Trained:
    """A run of another trainer.

    checkpoint: path of its checkpoint of step `SAVED`.
    losses: loss of each step, reported by its own trainer.
    """

    def __init__(self, folder: Path, checkpoint: Path, losses: list[float]) -> None:
        self.folder, self.checkpoint, self.losses = folder, checkpoint, losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[int]]]]:
    """Returns a folder that contains `model`, and the samples."""
    folder = tmp_path_factory.mktemp("trained")
    save_model(folder)
    return folder, run_ranks(1, samples, folder)[0]


@pytest.fixture(scope="module")
def transformers(model: tuple[Path, list[dict[str, list[int]]]]) -> Trained:
    folder, rows = model
    found = run_ranks(1, train_by_transformers, folder, rows, {})[0]
    return Trained(folder, folder / "out" / f"checkpoint-{SAVED}", found)


@pytest.fixture(scope="module")
def fsdp(model: tuple[Path, list[dict[str, list[int]]]]) -> Trained:
    folder, rows = model
    return Trained(folder, folder / "titan" / f"step-{SAVED}", run_ranks(2, train_by_fsdp, folder, rows)[0])


def test_the_next_loss_is_that_of_transformers_trainer(transformers: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = overrides(transformers.folder, "fsdp", f"train.run_dir={run}", f"train.resume={transformers.checkpoint}")
    said = heard(2, given)
    assert losses(run) == pytest.approx(transformers.losses[SAVED:], rel=SAME)
    assert f"imported   transformers' Trainer, step {SAVED}, from {transformers.checkpoint}" in said
    assert "this run goes on with" not in said
    assert "learning rate" not in said
    optimizer = torch.load(transformers.checkpoint / "optimizer.pt", weights_only=True)
    found = tensors(run / CHECKPOINTS / step_name(SAVED))
    assert torch.equal(found["exp_avg/model.embed_tokens.weight"], optimizer["state"][0]["exp_avg"])
    weights = load_file(transformers.checkpoint / "model.safetensors")
    assert all(torch.equal(found[f"model/{name}"], weight) for name, weight in weights.items())
    assert len(found) == 3 * len(weights)
    assert sum(float(found[key].sum()) for key in found if key.startswith("exp_avg_sq/")) == pytest.approx(
        sum(float(state["exp_avg_sq"].sum()) for state in optimizer["state"].values())
    )
    state = json.loads((run / CHECKPOINTS / step_name(SAVED) / "state.json").read_text())
    assert (state["samples"], state["engine"]["optimizer_steps"]) == (SAVED * BATCH, SAVED)
    assert len(losses(run)) == STEPS - SAVED


def test_the_entry_point_says_what_the_source_was_trained_with_and_a_run_what_it_changes(
    transformers: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "taken"
    assert main(["import", str(transformers.folder / "out" / f"checkpoint-{SAVED}"), str(target)]) == 0
    said = capfd.readouterr().out
    assert "trained with optimizer.weight_decay=0.05" in said
    assert f"trained with train.global_batch_size={BATCH}" in said
    assert main(["verify", str(target)]) == 0
    assert main(["export", str(target), str(tmp_path / "exported")]) == 0
    changed = ("optimizer.beta2=0.9", "optimizer.lr=1e-3", "scheduler=cosine", f"train.resume={target}")
    given = overrides(transformers.folder, "single", f"train.run_dir={tmp_path / 'run'}", *changed)
    said = heard(1, given)
    assert f"{target}: was trained with optimizer.beta2=0.95, this run goes on with 0.9" in said
    assert f"{target}: was trained with optimizer.lr=0.003, this run goes on with 0.001" in said
    assert f"{target}: its next update, step {SAVED + 1}, has a learning rate of 0.003, this run makes it with" in said
    other = overrides(transformers.folder, "single", f"train.run_dir={tmp_path / 'other'}", f"train.resume={target}")
    assert train([*other, "optimizer.ema=0.9", "optimizer.groups.vector.name=lion"]) == 2
    refused = capfd.readouterr().err
    assert f"{target}: saved with optimizer.ema=false, this run has optimizer.ema=true; give the same" in refused
    assert f'{target}: saved with optimizer.groups={{}}, this run has optimizer.groups={{"vector": "lion"}}' in refused


def imported(source: Path, target: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(["import", str(source), str(target), *more]) == 0
    return tensors(target)


def test_the_next_loss_is_that_of_an_fsdp_model_in_torchtitans_names(fsdp: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = overrides(fsdp.folder, "tensor", f"train.run_dir={run}", f"train.resume={fsdp.folder / 'titan'}")
    said = heard(2, given)
    assert losses(run) == pytest.approx(fsdp.losses[SAVED:], rel=SAME)
    assert f"imported   an FSDP model, step {SAVED}, from {fsdp.checkpoint}" in said
    assert f"the data go on at sample {SAVED * BATCH}" in said
    assert "this run goes on with" not in said


def test_all_layouts_of_one_fsdp_model_hold_the_same_bits(fsdp: Trained, tmp_path: Path) -> None:
    named = imported(fsdp.checkpoint, tmp_path / "titan", "--model", str(fsdp.folder / "model"))
    flat = imported(fsdp.folder / "flat", tmp_path / "flat")
    accelerate = imported(fsdp.folder / "accelerate", tmp_path / "accelerate")
    whole = imported(fsdp.folder / "whole", tmp_path / "whole")
    assert len(flat) == 3 * 21
    for other in (named, accelerate, whole):
        assert other.keys() == flat.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in flat.items())


def test_an_adapter_goes_on_with_its_moments(
    model: tuple[Path, list[dict[str, list[int]]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, rows = model
    theirs = run_ranks(1, partial(train_by_transformers, rank=4), folder, rows, {})[0]
    checkpoint = folder / "adapted" / f"checkpoint-{SAVED}"
    tuning = ["tuning=lora", "tuning.rank=4", "tuning.alpha=8", "tuning.target_modules=[down_proj,q_proj]"]
    words = [word for word in overrides(folder, "single", *tuning) if not word.startswith("model.weights")]
    words += ["model.weights=pretrained", f"train.resume={checkpoint}"]
    assert train([*words, f"train.run_dir={tmp_path / 'run'}"]) == 0
    assert losses(tmp_path / "run") == pytest.approx(theirs[SAVED:], rel=SAME)
    assert train([*words, "tuning.alpha=4", f"train.run_dir={tmp_path / 'other'}"]) == 2
    assert f"{checkpoint}: saved with tuning.alpha=8.0, this run has tuning.alpha=4.0" in capfd.readouterr().err
    assert main(["import", str(checkpoint), str(tmp_path / "never")]) == 2
    assert "holds adapters alone, of which only a run knows the model beneath" in capfd.readouterr().err


def test_a_refused_import_leaves_nothing_to_go_on_from(
    transformers: Trained, fsdp: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The import is refused before the conversion (settings, shapes of weights) or when the engine loads the states."""
    run, broken = tmp_path / "run", tmp_path / "broken"
    shutil.copytree(fsdp.folder / "whole", broken)
    states = torch.load(broken / "optimizer.bin", weights_only=True)
    states["state"]["model.norm.weight"]["exp_avg"] = torch.zeros(3)
    torch.save(states, broken / "optimizer.bin")
    theirs = transformers.checkpoint
    for source, given, said in (
        (theirs, "optimizer.ema=0.9", f"{theirs}: saved with optimizer.ema=false, this run has optimizer.ema=true"),
        (theirs, "train.global_batch_size=6", f"{theirs} stands at sample {SAVED * BATCH}, which is not a"),
        (fsdp.folder / "whole", "model.config.hidden_size=16", "of the shape [261, 32], and a llama of this run"),
        (broken, "train.seed=1", "model.norm.weight"),
    ):
        words = overrides(fsdp.folder, "single", f"train.run_dir={run}", f"train.resume={source}", given)
        assert train(words) != 0
        assert said in capfd.readouterr().err
        assert committed(run / CHECKPOINTS) == []
    words = overrides(fsdp.folder, "single", f"train.run_dir={run}", f"train.resume={theirs}", "train.steps=3")
    assert train(words) == 0
    assert losses(run) == pytest.approx(transformers.losses[SAVED:3], rel=SAME)
    assert sorted(path.name for path in (run / CHECKPOINTS).iterdir()) == [step_name(2), step_name(3)]


def test_a_loss_scale_is_taken_and_a_disk_too_small_is_one_line(
    transformers: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(transformers.checkpoint, source)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 7})
    torch.save(scaler.state_dict(), source / "scaler.pt")
    imported(source, tmp_path / "taken")
    engine = json.loads((tmp_path / "taken" / "state.json").read_text())["engine"]
    assert (engine["loss_scale"], engine["good_steps"]) == (512.0, 7)
    with small_disk(tmp_path / "small", size="256k") as small:
        capsys.readouterr()
        assert main(["import", str(source), str(small / "taken")]) == 2
        assert f"{small}/taken: {source} as a checkpoint of this trainer needs" in capsys.readouterr().err
        assert not list(small.iterdir())


def test_an_export_goes_on_under_fsdp_with_the_same_losses(
    model: tuple[Path, list[dict[str, list[int]]]], fsdp: Trained, tmp_path: Path
) -> None:
    named = imported(fsdp.checkpoint, tmp_path / "named", "--model", str(fsdp.folder / "model"))
    assert main(["export", str(tmp_path / "named"), str(tmp_path / "dcp"), "--format", "dcp"]) == 0
    found = run_ranks(2, train_by_fsdp, *model, tmp_path / "dcp")[0]
    assert found == fsdp.losses[SAVED:]
    back = imported(tmp_path / "dcp", tmp_path / "back")
    assert back.keys() == named.keys()
    assert all(torch.equal(tensor, named[key]) for key, tensor in back.items())


def test_a_hugging_face_folder_in_shards_with_all_that_makes_a_chat(
    transformers: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.data.tokenizer import build_byte_tokenizer

    source = tmp_path / "source"
    shutil.copytree(transformers.checkpoint, source)
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    taken, out = tmp_path / "taken", tmp_path / "out"
    imported(source, taken)
    assert main(["export", str(taken), str(out), "--max-shard-size", "50KB"]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"generation_config.json", "chat_template.jinja", "model.safetensors.index.json"} <= names
    shards = [path for path in out.iterdir() if path.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(path.stat().st_size < 55_000 for path in shards)
    weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert weights.keys() == load_file(source / "model.safetensors").keys()
    for name in ("optimizer.pt", "trainer_state.json"):
        shutil.copyfile(source / name, out / name)
    again, first = imported(out, tmp_path / "again"), tensors(taken)
    assert again.keys() == first.keys()
    assert all(torch.equal(tensor, first[key]) for key, tensor in again.items())

    capsys.readouterr()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for repo, offline, said in (
        ("a/b/c", False, "--push-to-hub a/b/c: Repo id must be"),
        ("me/mine", True, "--push-to-hub me/mine: HF_HUB_OFFLINE is set"),
        ("me/mine", False, "--push-to-hub me/mine: there is no token"),
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert main(["export", str(taken), str(tmp_path / "pushed"), "--push-to-hub", repo]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "pushed").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", str(taken), str(tmp_path / "pushed"), "--push-to-hub", "me/mine"]) == 1
    said = capsys.readouterr().err
    assert "--push-to-hub me/mine: the hub did not take it (" in said
    assert said.count("\n") == 1
    assert (tmp_path / "pushed" / "model.safetensors").exists()
    with small_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        there = tmp_path / "there"
        assert main(["export", str(taken), str(there), "--push-to-hub", "me/mine", "--private"]) == 0
        assert hub.address in capsys.readouterr().out
    assert hub.created == [{"name": "mine", "organization": "me", "visibility": "private"}]
    assert hub.files == {path.name: path.read_bytes() for path in there.iterdir()}
    assert main(["export", str(taken), str(tmp_path / "no"), "--format", "dcp", "--push-to-hub", "me/mine"]) == 2
    assert "--push-to-hub me/mine: is for --format transformers; leave it out" in capsys.readouterr().err
    assert main(["export", str(taken), str(tmp_path / "no"), "--max-shard-size", "many"]) == 2
    assert "--max-shard-size many: is no size; give one like 5GB or 500MiB" in capsys.readouterr().err


class Planted:
    """Unpickling this object makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def changed(source: Path, file: str, how: str, planted: Path) -> None:
    path = source / file
    if how == "a class":
        with path.open("wb") as stream:
            (pickle.dump if file.endswith(".metadata") else torch.save)({"state": Planted(planted)}, stream)
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "another optimizer":
        states = torch.load(path, weights_only=True)
        torch.save(
            {**states, "state": {number: {"exp_avg_sq_row": torch.zeros(3)} for number in states["state"]}}, path
        )
    elif how == "no states":
        torch.save({**torch.load(path, weights_only=True), "state": {}}, path)
    elif how == "no optimizer":
        torch.save(["something else"], path)
    elif how == "missing":
        path.unlink()
    elif how == "something else":
        path.write_text("something else")


@pytest.mark.parametrize(
    ("kind", "file", "how", "code", "said"),
    [
        (
            "transformers",
            "optimizer.pt",
            "a class",
            2,
            "optimizer.pt: a pickle that names posix.mkdir, which is refused",
        ),
        ("transformers", "optimizer.pt", "cut off", 1, "optimizer.pt: expected a whole file of torch.save"),
        ("transformers", "optimizer.pt", "missing", 2, "has no optimizer.pt (save_only_model)"),
        ("transformers", "optimizer.pt", "no optimizer", 1, "optimizer.pt: expected the state of a torch optimizer"),
        ("transformers", "optimizer.pt", "no states", 2, "optimizer.pt: its optimizer keeps nothing of a parameter"),
        ("transformers", "optimizer.pt", "another optimizer", 2, "its optimizer keeps exp_avg_sq_row of a parameter"),
        ("transformers", "model.safetensors", "cut off", 2, "model.safetensors is damaged (incomplete metadata"),
        ("transformers", "trainer_state.json", "something else", 1, "trainer_state.json: expected the state"),
        ("transformers", "adapter_config.json", "something else", 2, "adapter_config.json is no JSON object"),
        ("fsdp", ".metadata", "a class", 2, ".metadata: a pickle that names posix.mkdir, which is refused unread"),
        ("fsdp", ".metadata", "cut off", 1, ".metadata: expected the metadata of a torch distributed checkpoint"),
        ("fsdp", "__0_0.distcp", "cut off", 1, "__0_0.distcp: expected a whole file of torch.save"),
        ("fsdp", "__1_0.distcp", "missing", 1, "__1_0.distcp: expected a file, found none"),
    ],
)
def test_damage_is_one_line_and_nothing_of_a_pickle_runs(
    kind: str,
    file: str,
    how: str,
    code: int,
    said: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: Trained = request.getfixturevalue(kind)
    source = tmp_path / "source"
    shutil.copytree(trained.checkpoint, source)
    changed(source, file, how, tmp_path / "planted")
    target = tmp_path / "target"
    assert main(["import", str(source), str(target), "--model", str(trained.folder / "model")]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if str(source) in line]  # libraries log too
    assert len(lines) == 1
    assert said in lines[0]
    assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_of_no_known_kind_is_refused_with_those_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / CHECKPOINTS / step_name(4)).mkdir(parents=True)
    for name, said in (
        ("other", "is no checkpoint of a kind that can be imported; give"),
        ("absent", "there is no such folder; give"),
        ("run", f"is of this trainer already; go on from it with train.resume={tmp_path}/run\n"),
    ):
        assert main(["import", str(tmp_path / name), str(tmp_path / "target")]) == 2
        assert capsys.readouterr().err.startswith(f"{tmp_path / name}: {said}")
