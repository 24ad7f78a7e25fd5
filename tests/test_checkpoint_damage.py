"""A damaged checkpoint is detected and named, and the newest good one is used instead."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.errors import CheckpointDamaged, CheckpointMismatch, CookbookError, EnvironmentProblem
from configs.load import load_config
from tests.support.disks import closed_to_all
from tests.support.harness import run_ranks
from tests.support.parity import words
from tests.support.reports import lone_runtime
from tests.support.resuming import train_and_save
from trainer.checkpoint import catalog
from trainer.checkpoint.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.manifest import MANIFEST, STATE, Manifest, entry_of, read_manifest, write_manifest
from trainer.checkpoint.progress import identity
from trainer.data.build import build_data
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config
from trainer.plan.machine import Machine
from trainer.process.runtime import Runtime
from trainer.process.stopping import StopRequests

OLD, NEW = 2, 4
SETTINGS = words("gpt2", "fsdp", "fp32", NEW, f"checkpoint.every={OLD}", "model.config.n_layer=1")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(2, train_and_save, SETTINGS, str(folder))
    assert [path.name for path in committed(folder / CHECKPOINTS)] == [step_name(OLD), step_name(NEW)]
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with lone_runtime(make_plan(load_config(["launcher=python"]), Machine())) as runtime:
        yield runtime


def newest(run: Path) -> Path:
    return run / CHECKPOINTS / step_name(NEW)


def resume_step(runtime: Runtime, run: Path, *more: str) -> int | None:
    """Returns the step that a single process would resume from."""
    config = load_config([*SETTINGS, "parallel=single", "launcher=python", *more])
    plan = make_plan(config, Machine())
    hf_config = build_hf_config(config.model)
    data = build_data(config, plan, data_rank=0, vocab_size=hf_config.vocab_size)
    same = identity(config, hf_config, data)
    stop = StopRequests(None)
    found = CheckpointManager(config, plan, runtime, run, identity=same, tokenizer=data.tokenizer, stop=stop).find()
    return found.step if found else None


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}-000.safetensors"


def swap(folder: Path) -> None:
    first, second, aside = rank_file(folder, 0), rank_file(folder, 1), folder / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(rank_file(folder, 1), 1000),
    "empty": lambda folder: os.truncate(rank_file(folder, 0), 0),
    "deleted": lambda folder: rank_file(folder, 1).unlink(),
    "renamed": lambda folder: rank_file(folder, 1).rename(folder / "rank-00002-000.safetensors"),
    "swapped": swap,
    "from another step": lambda folder: shutil.copy(
        rank_file(folder.with_name(step_name(OLD)), 0), rank_file(folder, 0)
    ),
    "one file more": lambda folder: shutil.copy(rank_file(folder, 0), folder / "rank-00009-000.safetensors"),
    "state truncated": lambda folder: os.truncate(folder / STATE, 10),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": lambda folder: os.truncate(folder / MANIFEST, 0),
    "manifest of something else": lambda folder: (folder / MANIFEST).write_text("[1, 2]"),
    "manifest changed": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text().replace('"step": 4', '"step": 9')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_passed_over(
    damage: str, run: Path, runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    DAMAGE[damage](newest(run))
    assert resume_step(runtime, run) == OLD
    said = [record.message for record in caplog.records]
    assert any("expected" in line and "found" in line and str(newest(run)) in line for line in said), said
    assert f"{newest(run)}: damaged, passed over" in said
    # It is set aside, so it does not count toward keep_last, and the next save of its step finds the name free.
    assert [path.name for path in committed(run / CHECKPOINTS)] == [step_name(OLD)]
    assert (run / CHECKPOINTS / f"{step_name(NEW)}.damaged").is_dir()


def test_a_flipped_bit_anywhere_is_found(pristine: Path, tmp_path: Path, runtime: Runtime) -> None:
    names = [path.relative_to(newest(pristine)) for path in newest(pristine).rglob("*") if path.is_file()]
    assert len(names) >= 6
    for number, name in enumerate(names):
        for place in (0.0, 0.5, 1.0):
            run = tmp_path / f"{number}-{place}"
            shutil.copytree(pristine, run)
            path = newest(run) / name
            flip(path, int(place * (path.stat().st_size - 1)))
            try:
                found = resume_step(runtime, run)
            except CheckpointMismatch as error:
                # The version is the only field that is read before the hash, and the flipped bit made it a newer one.
                assert name.name == MANIFEST and "format" in str(error)
                continue
            whitespace = name.name == MANIFEST and place == 1.0  # the newline at the end of the manifest's JSON
            assert found == OLD or whitespace, (name, place)


def test_with_none_left_the_run_does_not_begin_again_in_silence(run: Path, runtime: Runtime) -> None:
    for step in (OLD, NEW):
        flip(rank_file(run / CHECKPOINTS / step_name(step), 0), 5000)
    with pytest.raises(CheckpointDamaged):
        resume_step(runtime, run)
    with pytest.raises(CheckpointDamaged) as caught:  # the second try fails too
        resume_step(runtime, run)
    assert caught.value.exit_code == 1
    assert "holds no checkpoint that is whole" in caught.value.problems[-1]


def test_an_empty_folder_is_step_0(tmp_path: Path, runtime: Runtime) -> None:
    assert resume_step(runtime, tmp_path) is None


def test_the_newest_whole_one_is_taken(run: Path, runtime: Runtime) -> None:
    assert resume_step(runtime, run) == NEW


def test_leftovers_of_a_kill_are_removed_and_a_replaced_one_comes_back(run: Path, runtime: Runtime) -> None:
    folder = run / CHECKPOINTS
    (folder / f".{step_name(6)}.partial").mkdir()
    (folder / f".{step_name(1)}.deleted").mkdir()
    newest(run).rename(folder / f".{step_name(NEW)}.replaced")
    assert resume_step(runtime, run) == NEW
    assert sorted(path.name for path in folder.iterdir()) == [step_name(OLD), step_name(NEW)]


@pytest.mark.parametrize("name", [MANIFEST, STATE, "rank-00001-000.safetensors", ".", ".."])
def test_what_cannot_be_read_is_no_damage(
    name: str, run: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is set aside, and no older checkpoint is used instead."""
    before = sorted(path.name for path in (run / CHECKPOINTS).iterdir())
    with closed_to_all(newest(run) / name):
        with pytest.raises(EnvironmentProblem, match=r"cannot be (read|written) \(Permission denied\); ") as caught:
            resume_step(runtime, run)
        assert main(["verify", str(run)]) == 2
    assert len(caught.value.problems) == 1
    assert capsys.readouterr().err.startswith(f"{(newest(run) / name).resolve()}")
    assert sorted(path.name for path in (run / CHECKPOINTS).iterdir()) == before
    assert resume_step(runtime, run) == NEW


@pytest.mark.parametrize("wrong", ["name", "state"])
def test_another_step_in_the_name_or_the_state_is_damage(wrong: str, run: Path, runtime: Runtime) -> None:
    if wrong == "name":
        newest(run).rename(newest(run).with_name(step_name(9)))
    else:
        state = newest(run) / STATE
        state.write_text(state.read_text().replace(f'"step": {NEW}', '"step": 9'))
        rewrite(newest(run), lambda m: replace(m, files={**m.files, STATE: entry_of(state)}))
    assert main(["verify", str(run)]) == 1
    assert resume_step(runtime, run) == OLD


def test_which_checkpoints_stay() -> None:
    paths = [Path(step_name(step)) for step in (10, 20, 30, 40, 50)]
    assert catalog.surplus(paths, keep_last=2, keep_every=0) == paths[:3]
    assert catalog.surplus(paths, keep_last=1, keep_every=20) == [paths[0], paths[2]]
    assert catalog.surplus(paths, keep_last=9, keep_every=0) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("model.config.n_embd=32", "n_embd=64, this run has model.n_embd=32"),
        ("model.config.vocab_size=300", "vocab_size=261, this run has model.vocab_size=300"),
        ("data.seq_len=16", "data.seq_len=32, this run has data.seq_len=16"),
        ("train.seed=5", "train.seed=0, this run has train.seed=5"),
        (
            "optimizer=muon",
            "optimizer.name=adamw, this run has optimizer.name=muon (adamw keeps exp_avg and exp_avg_sq of a matrix,"
            " muon keeps momentum_buffer)",
        ),
        ("train.global_batch_size=10", "stands at sample 32, which is not a multiple"),
    ],
)
def test_another_runs_checkpoint_is_one_line(change: str, problem: str, run: Path, runtime: Runtime) -> None:
    before = contents(run)
    with pytest.raises(CheckpointMismatch) as caught:
        resume_step(runtime, run, change)
    assert caught.value.exit_code == 2
    assert any(problem in line for line in caught.value.problems), caught.value.problems
    assert contents(run) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_tokenizer(folder: Path, vocabulary: list[str]) -> Path:
    model = models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": vocabulary[0], "eos_token": vocabulary[1]}
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


def test_another_tokenizer_of_that_size_or_another_text_is_one_line(runtime: Runtime, tmp_path: Path) -> None:
    first = write_tokenizer(tmp_path / "first", ["[UNK]", "[EOS]", "one", "two", "three"])
    second = write_tokenizer(tmp_path / "second", ["[UNK]", "[EOS]", "two", "one", "three"])
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("one two three " * 2000)
    files = ["data=files", f"data.paths=[{text}]", "data.ignore_fraction=0", "train.eval_samples=0"]
    files.append(f"data.cache_dir={tmp_path / 'cache'}")
    own = [*files, f"data.tokenizer={first}"]
    run_ranks(1, train_and_save, [*SETTINGS, "parallel=single", "launcher=python", *own, "train.steps=2"], str(run))
    assert resume_step(runtime, run, *own) == OLD
    before = contents(run)
    with pytest.raises(CheckpointMismatch) as caught:
        resume_step(runtime, run, *files, f"data.tokenizer={second}")
    assert any("saved with tokenizer=" in line for line in caught.value.problems), caught.value.problems
    text.write_text("three two one " * 2000)
    with pytest.raises(CheckpointMismatch) as caught:
        resume_step(runtime, run, *own)
    (line,) = caught.value.problems
    assert "saved with data.fingerprint=" in line
    assert "give the same data" in line
    assert contents(run) == before


def rewrite(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, change(manifest))


def test_a_newer_format_is_refused(run: Path, runtime: Runtime) -> None:
    path = newest(run) / MANIFEST
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointMismatch, match="written in checkpoint format 2, this version reads up to 1"):
        resume_step(runtime, run)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_manifest_cannot_lead_out_of_its_folder(absolute: bool, run: Path, runtime: Runtime, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    shutil.copy(rank_file(newest(run), 0), outside)
    name = str(outside) if absolute else "../../../outside.safetensors"
    rewrite(newest(run), lambda m: replace(m, files={**m.files, name: entry_of(outside)}))
    assert resume_step(runtime, run) == OLD


def test_a_link_is_not_a_file(run: Path, runtime: Runtime, tmp_path: Path) -> None:
    rank_file(newest(run), 0).rename(tmp_path / "moved")
    rank_file(newest(run), 0).symlink_to(tmp_path / "moved")
    assert resume_step(runtime, run) == OLD


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (os.environ["MARKER"],)


def test_nothing_in_a_checkpoint_is_executed(
    run: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is replaced by a pickle. An attacker who can write the files can write a matching manifest too."""
    monkeypatch.setenv("MARKER", str(tmp_path / "executed"))
    poison = pickle.dumps(Payload())
    for name in list(read_manifest(newest(run)).files):
        copy = tmp_path / name.replace("/", "-") / "run"
        shutil.copytree(run, copy)
        (newest(copy) / name).write_bytes(poison)
        rewrite(
            newest(copy),
            lambda m, name=name, copy=copy: replace(m, files={**m.files, name: entry_of(newest(copy) / name)}),
        )
        try:
            resume_step(runtime, copy)
            main(["export", str(copy), str(tmp_path / "exported")])
        except (CookbookError, OSError, ValueError):
            pass
        assert not (tmp_path / "executed").exists(), name
        shutil.rmtree(tmp_path / "exported", ignore_errors=True)


def test_export_takes_the_newest_whole_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(rank_file(newest(run), 1), 7000)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert step_name(OLD) in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'out'}: exists; choose another folder\n"
    assert main(["verify", str(newest(run))]) == 1
    assert "expected SHA-256" in capsys.readouterr().err
    assert main(["verify", str(run)]) == 1
    assert "its newest checkpoint is damaged; the newest whole one is " in capsys.readouterr().err
