"""The run folder: names, the record of the run, refusals."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs.errors import EnvironmentProblem
from configs.load import from_yaml, load_config
from tests.support.harness import run_ranks
from tests.support.reports import config_and_plan, lone_runtime
from trainer.plan.trackers import TRACKERS
from trainer.process.runtime import join_world
from trainer.report.folder import claim_run_dir, default_run_dir, make_run_dir, open_run_folder, run_label
from trainer.report.provenance import git_state

NOON = datetime(2026, 1, 2, 12, 0, 0)


def test_the_name_says_model_layout_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["model=gpt2", "parallel=zero2", "precision=bf16"])
    assert default_run_dir(config, NOON) == Path("runs/gpt2-zero2-bf16/20260102-120000")
    config = load_config(['model.path="/models/My Llama (8B)/"', "parallel=ddp"])
    assert run_label(config) == "My_Llama_8B_-ddp-fp32"


def test_two_runs_in_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config([])
    folders = [claim_run_dir(config, NOON) for _ in range(3)]
    assert [folder.name for folder in folders] == ["20260102-120000", "20260102-120000-2", "20260102-120000-3"]
    assert all(folder.is_absolute() and folder.is_dir() for folder in folders)


def test_the_record_is_complete_and_holds_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-in-the-environment"
    monkeypatch.setenv("SOME_SERVICE_TOKEN", canary)
    config, plan = config_and_plan(tmp_path / "run", "launcher=python")
    with lone_runtime(plan) as runtime:
        folder = open_run_folder(config, plan, runtime, argv=["trainer", "a=b c"])
    assert folder == tmp_path / "run"
    assert from_yaml((folder / "config.yaml").read_text()) == config
    assert (folder / "plan.txt").read_text() == plan.describe() + "\n"
    assert json.loads((folder / "argv.json").read_text()) == ["trainer", "a=b c"]
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"] == metadata.version("torch")
    assert versions["packages"]["transformers"] == metadata.version("transformers")
    assert versions["device"]["type"] == "cpu"
    assert not [path for path in folder.rglob("*") if path.is_file() and canary in path.read_text()]


def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python")
    (tmp_path / "metrics.jsonl").write_text("the metrics of another run\n")
    with lone_runtime(plan) as runtime, pytest.raises(EnvironmentProblem) as caught:
        open_run_folder(config, plan, runtime)
    assert caught.value.problems == (
        f"train.run_dir={tmp_path}: holds a run already (metrics.jsonl); choose another folder,"
        " or leave train.run_dir out",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == "the metrics of another run\n"


def test_an_empty_folder_that_a_launcher_made_is_used(tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path, "launcher=python")
    (tmp_path / "logs").mkdir()
    with lone_runtime(plan) as runtime:
        assert open_run_folder(config, plan, runtime) == tmp_path


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        config, plan = config_and_plan(place, "launcher=python")
        with lone_runtime(plan) as runtime, pytest.raises(EnvironmentProblem) as caught:
            open_run_folder(config, plan, runtime)
        (problem,) = caught.value.problems
        assert problem.startswith(f"train.run_dir={place}: cannot be written (")
        assert problem.endswith("); choose a folder that can")


def test_a_tracker_that_is_not_installed_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    missing = next((name for name in TRACKERS if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("every tracker is installed")
    config, plan = config_and_plan(tmp_path / "run", "launcher=python", f"logging.tracker={missing}")
    with lone_runtime(plan) as runtime, pytest.raises(EnvironmentProblem) as caught:
        open_run_folder(config, plan, runtime)
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"logging.tracker={missing}: its package is not installed; pip install {TRACKERS[missing]}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_start_that_failed_before_its_first_step_is_in_nobodys_way(resume: str, tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path / "run", "launcher=python", f"train.resume={resume}")
    with lone_runtime(plan) as runtime:
        for words in (["mistaken"], ["corrected"]):
            open_run_folder(config, plan, runtime, argv=words)
    assert json.loads((tmp_path / "run" / "argv.json").read_text()) == ["corrected"]


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_somebody_elses_config_yaml_is_left_alone(resume: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("theme: dark\n")
    config, plan = config_and_plan(tmp_path, "launcher=python", f"train.resume={resume}")
    with lone_runtime(plan) as runtime, pytest.raises(EnvironmentProblem, match=r"holds a run already \(config\.yaml"):
        open_run_folder(config, plan, runtime)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "theme: dark\n")]


def test_two_launches_in_one_second_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [make_run_dir(load_config([]), NOON) for _ in range(2)]
    assert [folder.name for folder in folders] == ["20260102-120000", "20260102-120000-2"]


def open_twice(folder: str) -> tuple[str, tuple[str, ...]]:
    """Open a folder with the default name on this rank, then a folder that is already taken."""
    os.chdir(folder)
    config, plan = config_and_plan(None, "parallel=ddp")
    with join_world(plan, timeout_minutes=1) as runtime:
        opened = open_run_folder(config, plan, runtime)
        (opened / "metrics.jsonl").touch()
        config.train.run_dir, config.train.resume = str(opened), "never"
        try:
            open_run_folder(config, plan, runtime)
        except EnvironmentProblem as error:
            return str(opened), error.problems
    return str(opened), ()


def test_every_rank_knows_the_folder_and_every_rank_is_refused(tmp_path: Path) -> None:
    (first, problems), (second, same) = run_ranks(2, open_twice, str(tmp_path))
    assert first == second
    assert Path(first).parent == tmp_path / "runs" / "tiny-ddp-fp32"
    assert problems == same
    assert len(problems) == 1
    assert "holds a run already" in problems[0]


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


def test_git_state_tells_commit_and_changes_but_no_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    git(work, "init", "-q", "-b", "trunk")
    git(work, "remote", "add", "origin", "https://me:hunter2@example.org/repo.git")
    (work / "notes.txt").write_text("before\n")
    git(work, "add", "notes.txt")
    git(work, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    (work / "notes.txt").write_text("after\n")
    (work / "new.txt").write_text("")
    (work / "deeper").mkdir()
    monkeypatch.chdir(work / "deeper")
    state = git_state(out)["cwd"]
    assert state["root"] == str(work)
    assert len(state["commit"]) == 40
    assert (state["branch"], state["dirty"], state["untracked"]) == ("trunk", True, ["new.txt"])
    assert "-before\n+after" in (out / "git-cwd.diff").read_text()
    assert "hunter2" not in json.dumps(state)


def test_the_diff_leaves_out_what_may_hold_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    git(work, "init", "-q")
    files = {
        ".env": "PORT={}",
        "prod.env.local": "PORT={}",
        "my keys/id_rsa": "{}",
        "run.sh": "export WANDB_API_KEY=0123456789abcdef0123456789abcdef0123456{}",
        "db.py": "url = 'postgres://me:hunter{}@db/x'",
        "model.py": "token = tokenizer.eos_token_id + {}",
    }
    for state in (1, 2):
        for name, text in files.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_text(text.format(state) + "\n")
        if state == 1:
            git(work, "add", ".")
            git(work, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    monkeypatch.chdir(work)
    caplog.set_level("INFO", logger="trainer")
    left_out = [".env", "db.py", "my keys/id_rsa", "prod.env.local", "run.sh"]
    assert git_state(out)["cwd"]["left_out"] == left_out
    diff = (out / "git-cwd.diff").read_text()
    assert "+token = tokenizer.eos_token_id + 2" in diff
    assert not any(word in diff for word in ("PORT", "hunter", "0123456789abcdef"))
    assert f"git-cwd.diff leaves out what may hold a key: {', '.join(left_out)}" in caplog.messages


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o600), (0o077, 0o600), (0o002, 0o660)])
def test_the_record_is_for_its_owner_and_a_group_that_shares_its_files(umask: int, mode: int, tmp_path: Path) -> None:
    config, plan = config_and_plan(tmp_path / "run", "launcher=python")
    before = os.umask(umask)
    try:
        with lone_runtime(plan) as runtime:
            folder = open_run_folder(config, plan, runtime)
    finally:
        os.umask(before)
    private = [folder / name for name in ("config.yaml", "argv.json", "git.json")]
    assert {path.stat().st_mode & 0o777 for path in (*private, *folder.glob("*.diff"))} == {mode}
    assert (folder / "plan.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_without_a_checkout_there_is_no_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "cwd" not in git_state(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert all(state["commit"] is None for state in git_state(tmp_path).values())
