"""Real trackers: Weights & Biases offline, TensorBoard read back; no API key is written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.load import load_config
from tests.support.harness import run_ranks
from tests.support.reports import config_and_plan, lone_runtime, read_metrics, report_run, result
from trainer.__main__ import main
from trainer.plan.trackers import TRACKERS, check_tracker
from trainer.process.runtime import join_world
from trainer.report.measure import StepSeconds

ROOT = Path(__file__).parent.parent
CANARY = "canary0123456789canary0123456789canary01"
SECONDS = StepSeconds(step=0.5, data=0.1, forward_backward=0.3, optimizer=0.05)


def test_the_known_trackers_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)


def test_an_unknown_tracker_is_one_line_with_the_known_ones() -> None:
    assert list(check_tracker(load_config([]).logging)) == []
    (problem,) = check_tracker(load_config(["logging.tracker=wandbb"]).logging)
    assert problem == (
        "logging.tracker=wandbb: not a known tracker; use none, aim, clearml, comet_ml, dvclive, mlflow, swanlab,"
        " tensorboard, trackio, wandb, custom"
    )


USERS = "tests.support.trackers_of_users"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["logging=custom"], "logging.target=null: logging.tracker=custom needs it: logging.target=package.module.Cla"),
        (["logging.target=a.B"], "logging.target=a.B: is for logging.tracker=custom, this is none; set that, or leave"),
        (
            ["logging=custom", f"logging.target={USERS}.Lines", "logging.options.fiel=x"],
            f"logging.options.fiel=x: {USERS}.Lines has no such option; did you mean logging.options.file?",
        ),
        (["logging=custom", "logging.target=math.pi"], "logging.target=math.pi: is no class; give one"),
        (["logging=custom", "logging.target=builtins.dict"], "logging.target=builtins.dict: has no log() and no finis"),
    ],
)
def test_a_tracker_of_the_users_own_refuses(words: list[str], line: str) -> None:
    problems = list(check_tracker(load_config(words).logging))
    assert [problem for problem in problems if problem.startswith(line)], problems


def test_a_tracker_of_the_users_own_gets_what_every_tracker_gets(tmp_path: Path) -> None:
    own = ["logging=custom", f"logging.target={USERS}.Lines", "logging.options.file=own.txt"]
    config, plan = config_and_plan(tmp_path / "run", "launcher=python", *own)
    with lone_runtime(plan) as runtime:
        report_run(config, plan, runtime, [result(5.0), result(4.5)], SECONDS)
    lines = (tmp_path / "run" / "own.txt").read_text().splitlines()
    assert lines[0].startswith("begin ") and lines[-1] == "end False"
    steps = {line["step"] for line in read_metrics(tmp_path / "run") if line["kind"] == "step"}
    assert {int(line.split()[0]) for line in lines[1:-1]} >= steps and "loss" in lines[1]


@pytest.mark.parametrize("option", ["api_key", "API_KEY", "apikey", "auth_token", "settings.password", "secret"])
def test_a_key_in_the_options_is_refused_without_repeating_it(option: str) -> None:
    words = ["logging=wandb", f"logging.options.{option}={CANARY}"]
    (problem,) = check_tracker(load_config(words).logging)
    assert problem.startswith(f"logging.options.{option}: a key does not belong in a configuration")
    assert CANARY not in problem


def test_options_that_only_sound_like_a_key_pass() -> None:
    words = ["logging=wandb", "logging.options.entity=team", "logging.options.experiment_key=abc"]
    assert list(check_tracker(load_config(words).logging)) == []


@pytest.mark.parametrize(
    ("name", "refused"), [("../../../x", True), ("/x", True), ("~/x", True), ("team/run..1", False)]
)
def test_a_run_name_stays_in_the_run_folder(name: str, refused: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["logging=tensorboard", f'logging.run_name="{name}"', "dry_run=true", "parallel=single"]
    assert main(words) == 2 * refused
    problem = f"logging.run_name={name}: trackers name a folder after it, which must lie in the run folder; leave out"
    assert capsys.readouterr().err.startswith(problem * refused)


def wandb_environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Return this environment without any wandb login, plus `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {
        **kept,
        "NETRC": str(tmp_path / "no-netrc"),
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }


def bytes_of(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def test_wandb_offline_keeps_the_run_and_no_key(tmp_path: Path) -> None:
    """The whole trainer runs with an API key in the environment."""
    folder = tmp_path / "run"
    words = ["train.steps=2", "train.micro_batch_size=1", "train.eval_samples=2", "data=synthetic", "data.seq_len=16"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words, "launcher=python", "logging=wandb", f"train.run_dir={folder}"],
        cwd=tmp_path,
        env=wandb_environment(tmp_path, WANDB_API_KEY=CANARY, WANDB_MODE="offline"),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert [line["kind"] for line in read_metrics(folder)].count("step") == 2
    (run,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    assert all(key in content for key in (b"validation_perplexity", b"forward_backward_seconds", b"global_batch_size"))
    assert CANARY.encode() not in done.stdout + done.stderr
    assert [path for path, content in bytes_of(tmp_path) if CANARY.encode() in content] == []


def test_wandb_is_asked_to_stay_offline_without_a_login(tmp_path: Path) -> None:
    """It runs in a separate process, since the client keeps its settings. Only `init`, which would call the server, is
    replaced: it prints its arguments."""
    netrc = tmp_path / "netrc"
    code = f"""
import wandb
wandb.init = lambda **options: print(options.get("mode"), options["dir"], options["name"], options["config"]["train"])
from pathlib import Path
from configs.load import load_config
from trainer.plan.machine import Machine
from trainer.make_plan import make_plan
from trainer.report.trackers import start_tracker
config = load_config(["logging=wandb", "launcher=python"])
def start():
    start_tracker(config, make_plan(config, Machine()), Path({str(tmp_path)!r}), run_name="mine")
start()
netrc = Path({str(netrc)!r})
netrc.write_text("machine api.wandb.ai login user password {CANARY}")
start()
netrc.unlink()
import os
os.environ["WANDB_MODE"] = "disabled"
start()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=wandb_environment(tmp_path, NETRC=str(netrc)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    asked = [line.split(" {")[0] for line in done.stdout.splitlines()]
    assert asked == [f"{mode} {tmp_path} mine" for mode in ("offline", None, None)]
    assert "'steps': 100" in done.stdout
    assert CANARY not in done.stdout + done.stderr


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, plan = config_and_plan(tmp_path, "launcher=python", "logging=tensorboard", "logging.run_name=mine")
    with lone_runtime(plan) as runtime:
        folder = report_run(config, plan, runtime, [result(3.0), result(2.0)], SECONDS)
    events = EventAccumulator(str(folder / "tensorboard" / "mine")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 3.0), (2, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(0, 5.0), (2, 4.0)]
    assert {"tokens_per_second", "peak_host_bytes", "grad_norm", "lr"} <= set(events.Tags()["scalars"])
    assert "mfu" not in events.Tags()["scalars"]
    (hyperparameters,) = (folder / "tensorboard" / "mine").glob("*/hparams.yml")
    text = hyperparameters.read_text()
    assert "optimizer.lr: 0.0003" in text
    assert "plan.global_batch_size: 2" in text


def beside_accelerate(folder: str) -> dict[str, object]:
    """Return the state after a tracker ran in a rank of DeepSpeed's CPU launcher, without OMP_NUM_THREADS."""
    import deepspeed.comm

    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    torch.set_num_threads(3)
    config, plan = config_and_plan(Path(folder), "parallel=ddp", "logging=tensorboard")
    with join_world(plan, timeout_minutes=1) as runtime:
        before = dict(os.environ)
        report_run(config, plan, runtime, [result()], SECONDS)
        return {
            "environment": dict(os.environ) == before,
            "threads": torch.get_num_threads(),
            "world": dist.get_world_size(),
            "sum": runtime.sum(1.0),
            "deepspeed": deepspeed.comm.is_initialized(),
        }


def test_accelerate_changes_nothing_in_a_rank(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    expected = {"environment": True, "threads": 3, "world": 2, "sum": [2.0], "deepspeed": False}
    assert run_ranks(2, beside_accelerate, str(tmp_path / "run")) == [expected, expected]
    assert len(list((tmp_path / "run" / "tensorboard").glob("*/events.out.tfevents.*"))) == 1
