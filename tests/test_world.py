"""Launcher variables are checked before any rank waits; a process can run twice; the right modules are imported."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from configs.load import load_config
from launch.cookbook import COMMANDS
from launch.cookbook import main as cookbook
from tests.support.cases import train
from tests.support.harness import RankFailed, run_ranks
from trainer.__main__ import main
from trainer.estimate.estimate import estimate
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.status import check_idle
from trainer.process.world import VARIABLES, accelerate_note

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
SMALL = (
    "data=synthetic",
    "data.seq_len=16",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "train.steps=2",
    "train.global_batch_size=4",
    "train.eval_samples=0",
    "train.export=false",
    "cluster.device=cpu",
    "logging.progress=off",
)
ONE, TWO = {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("world", "problems"),
    [
        ({**ONE, "RANK": "5"}, ["RANK=5: must be below WORLD_SIZE=1"]),
        ({**ONE, "RANK": "abc"}, ["RANK=abc: must be a whole number, 0 or more"]),
        ({**ONE, "RANK": "-1", "LOCAL_RANK": "1.0"}, ["RANK=-1: must be a whole", "LOCAL_RANK=1.0: must be a whole"]),
        ({**ONE, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999: must be a port, from 1 to 65535"]),
        ({**ONE, "MASTER_PORT": "http"}, ["MASTER_PORT=http: must be a port"]),
        ({"RANK": "0"}, ["WORLD_SIZE: not set, though RANK=0 is"]),
        ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE=two: must be a whole number"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            [f"{name}: not set, though WORLD_SIZE=2 ranks must meet there" for name in MEETING],
        ),
        ({**TWO, **MEETING, "LOCAL_RANK": "7"}, ["LOCAL_RANK=7: must be below WORLD_SIZE=2"]),
        ({**TWO, **MEETING, "LOCAL_WORLD_SIZE": "1"}, ["LOCAL_RANK=1: must be below LOCAL_WORLD_SIZE=1"]),
        ({**ONE, "LOCAL_SIZE": "8"}, ["LOCAL_SIZE=8: must not be above WORLD_SIZE=1", "LOCAL_RANK: not set"]),
    ],
)
def test_a_world_that_cannot_be_costs_a_line_and_no_waiting(
    world: dict[str, str], problems: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert main([*SMALL, "cluster.gpus_per_node=1"]) == 2
    shown = sorted(capsys.readouterr().err.splitlines())
    assert len(shown) == len(problems)
    for line, problem in zip(shown, sorted(problems), strict=True):
        assert line.startswith(problem)


def _taken(port: int, words: list[str], heard: str) -> int:
    os.environ["MASTER_PORT"] = str(port)
    with open(f"{heard}/{os.environ['RANK']}", "w") as stderr, contextlib.redirect_stderr(stderr):
        code = main(words)
    assert code == 0, f"exit code {code}"
    return code


def test_a_port_that_is_taken_is_reported_by_rank_0(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(RankFailed, match="exit code 1"):
            words = [*SMALL, "parallel=ddp", f"train.run_dir={tmp_path}/run"]
            run_ranks(2, _taken, port, words, str(tmp_path), timeout=20)
    problem = f"MASTER_PORT={port}: the ranks cannot meet there (Address already in use); "
    assert (tmp_path / "0").read_text().startswith(problem)


def _several(folder: str) -> list[dict[str, object]]:
    """Run several times in one process without a launcher, and return the state that each run left."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    variables = (*VARIABLES, "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    found: list[dict[str, object]] = []
    for number, layout in enumerate(("single", "zero1", "zero3", "single", "single")):
        run = Path(folder, str(number))
        if number == 4:  # a stop requested before the first step takes effect after it
            run.mkdir()
            (run / "STOP").touch()
        before = [signal.getsignal(one) for one in numbers]
        code = main([*SMALL, f"parallel={layout}", "cluster.gpus_per_node=1", f"train.run_dir={run}"])
        check_idle(run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append(
            {
                "code": code,
                "losses": [line["loss"] for line in lines if line["kind"] == "step"],
                "left": [name for name in variables if name in os.environ],
                "handlers": [signal.getsignal(one) for one in numbers] == before,
                "log": len(logging.getLogger("trainer").handlers),
            }
        )
    return found


def test_runs_in_one_process_leave_nothing_to_the_next(tmp_path: Path) -> None:
    (runs,) = run_ranks(1, _several, str(tmp_path))
    assert [run["code"] for run in runs] == [0, 0, 0, 0, 75]
    for run in runs:
        assert (run["left"], run["handlers"], run["log"]) == ([], True, 0)
    first, zero1, zero3, again, stopped = (run["losses"] for run in runs)
    assert again == first and len(first) == 2 and stopped == first[:1]
    assert zero1 == pytest.approx(first, rel=1e-5) == zero3


def test_what_accelerate_was_asked_for_is_named_with_our_key(capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "False"}
    assert accelerate_note(plain) is None
    note = accelerate_note({**plain, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert note == (
        "accelerate   its configuration asks for FSDP (parallel=fsdp), mixed precision bf16 (precision=bf16); that has"
        " no effect here: the keys in brackets decide"
    )


ACCELERATE_FILE = """
distributed_type: FSDP
mixed_precision: bf16
num_processes: 2
main_process_port: 0
dynamo_config: {dynamo_backend: INDUCTOR}
fsdp_config: {fsdp_version: 2}
"""


def note_under_accelerate(file: str) -> list[str | None]:
    """Run accelerate's launcher up to the start of the ranks, and return the note that a rank would show."""
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser

    notes: list[str | None] = []
    torch.distributed.run.run = lambda _args: notes.append(accelerate_note())
    launch_command(launch_command_parser().parse_args(["--config_file", file, "--module", "trainer"]))
    return notes


def test_what_a_file_of_accelerate_asks_for_is_named(tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text(ACCELERATE_FILE)
    (notes,) = run_ranks(1, note_under_accelerate, str(tmp_path / "fsdp.yaml"))
    assert notes == [
        "accelerate   its configuration asks for FSDP (parallel=fsdp), mixed precision bf16 (precision=bf16),"
        " torch.compile with inductor (train.compile=true); that has no effect here: the keys in brackets decide"
    ]


@pytest.fixture
def own_project(tmp_path: Path) -> Path:
    """Return a user's folder with modules of the same names as ours."""
    (tmp_path / "configs").mkdir()
    for name in ("configs/__init__.py", "torch.py", "hydra.py"):
        (tmp_path / name).write_text("raise SystemExit('the working directory was imported')\n")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "launch", "dry_run=true", "parallel=ddp", "cluster.device=cpu"),
        (sys.executable, "-m", "trainer", "--cfg", "job"),
        (BIN / "cookbook", "launch", "dry_run=true", "parallel=ddp", "cluster.device=cpu"),
    ],
)
def test_the_working_directory_does_not_decide_what_is_imported(command: tuple[str, ...], own_project: Path) -> None:
    if command[1] != "-m":
        for name in ("trainer.py", "launch.py", "slurm.py"):
            (own_project / name).write_text("raise SystemExit('the working directory was imported')\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=own_project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_cookbook_has_every_entry_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert cookbook(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name} " in text
        try:
            code = cookbook([name, "--help"])
        except SystemExit as left:  # argparse
            code = left.code
        assert code == 0
        assert capsys.readouterr().out
    assert cookbook(["trian"]) == 2
    assert capsys.readouterr().err.startswith("cookbook trian: no such command; there are train, launch, ")


@pytest.mark.parametrize("words", ["generate", "report", "import", "checkpoint", "checkpoint export a", "report a --b"])
def test_a_missing_word_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cookbook(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" --help")


def traced_then_trained(overrides: list[str]) -> list[float]:
    config = load_config(overrides)
    estimate(config, make_plan(config, find_machine()))
    return train(overrides).losses


def test_a_rank_trains_on_its_own_mesh_after_a_trace_on_a_fake_one(tmp_path: Path) -> None:
    """DTensor treats equal meshes as one, so the gradient norm would use process groups that no longer exist."""
    words = ["parallel=3d", "data=synthetic", "data.seq_len=16", "train.steps=1", "train.micro_batch_size=1"]
    losses = run_ranks(4, traced_then_trained, [*words, f"data.cache_dir={tmp_path}"])
    assert losses == [losses[0]] * 4 and losses[0][0] > 0
