"""The entry points: launcher arguments, instant answers, one-line errors, and the same run under each launcher."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load_config
from launch.__main__ import main
from launch.command import Command, Rendezvous, build_command
from launch.sweep import TITLES
from tests.support.warm import programs
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


def command(words: list[str], machine: Machine | None = None, **rest: object) -> Command:
    """Returns the command for these overrides. The launchers' folder comes first on PATH, so their names suffice."""
    config = load_config(words)
    given: dict[str, object] = {
        "run_dir": Path("runs/x"),
        "rendezvous": Rendezvous(port=4242),
        "environment": {},
        "cores": 64,
    }
    return build_command(config, make_plan(config, machine or Machine()), words, **{**given, **rest})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def launchers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("words", "machine", "text"),
    [
        (
            "launcher=torchrun parallel=ddp",
            Machine(),
            "OMP_NUM_THREADS=1 torchrun --rdzv-backend=loopback --nproc-per-node=2 -m trainer",
        ),
        (
            "launcher=torchrun parallel=ddp launcher.master_port=7000",
            Machine(gpus=8),
            "OMP_NUM_THREADS=8 torchrun --rdzv-backend=loopback --rdzv-conf=port=7000 --nproc-per-node=8 -m trainer",
        ),
        (
            "launcher=torchrun parallel=zero3 cluster.nodes=2",
            Machine(gpus=8),
            "OMP_NUM_THREADS=8 torchrun --nnodes=2 --node-rank=0 --master-addr=127.0.0.1 --master-port=4242"
            " --nproc-per-node=8 -m trainer",
        ),
        (
            "launcher=deepspeed parallel=zero2",
            Machine(),
            "OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu deepspeed --num_gpus=2 --master_port=4242"
            " --log_level=critical --no_local_rank --module trainer",
        ),
        (
            "launcher=deepspeed parallel=zero2 cluster.nodes=2",
            Machine(gpus=4),
            "OMP_NUM_THREADS=16 deepspeed --hostfile=HOSTFILE --no_ssh --node_rank=0 --master_addr=127.0.0.1"
            " --master_port=4242 --log_level=critical --no_local_rank --module trainer",
        ),
        (
            "launcher=accelerate parallel=ddp",
            Machine(),
            "OMP_NUM_THREADS=1 accelerate launch --multi_gpu --num_processes=2 --num_machines=1"
            " --main_process_port=4242 --rdzv_backend=loopback --mixed_precision=no --dynamo_backend=no"
            " --module trainer",
        ),
        (
            "launcher=accelerate parallel=ddp cluster.nodes=2",
            Machine(gpus=8),
            "OMP_NUM_THREADS=8 accelerate launch --multi_gpu --num_processes=16 --num_machines=2 --machine_rank=0"
            " --main_process_ip=127.0.0.1 --main_process_port=4242 --mixed_precision=no --dynamo_backend=no"
            " --module trainer",
        ),
        ("launcher=python", Machine(), f"{PYTHON} -m trainer"),
        (
            """launcher=torchrun 'launcher.args=["--max-restarts=2",-v]'""",
            Machine(),
            "torchrun --rdzv-backend=loopback --nproc-per-node=1 --max-restarts=2 -v -m trainer",
        ),
    ],
)
def test_the_words_of_each_launcher(words: str, machine: Machine, text: str) -> None:
    built = command(shlex.split(words), machine)
    assert built.text() == f"{text} {words} train.run_dir=runs/x"


def test_words_go_on_as_they_were_typed() -> None:
    words = ["data=files", "data.paths=['my file.txt', \"it's\", $HOME]", "logging.run_name='a;b'"]
    built = command([*words, "dry_run=true"], run_dir=Path("my runs/x"), config_dir="my dir")
    passed_on = built.argv[built.argv.index("trainer") + 1 :]
    assert list(passed_on) == ["--config-dir", "my dir", *words, "train.run_dir='my runs/x'"]
    assert shlex.split(built.text())[-len(passed_on) :] == list(passed_on)
    assert load_config(passed_on[2:]).train.run_dir == "my runs/x"


def test_a_run_folder_that_was_typed_is_not_named_again() -> None:
    built = command(["parallel=ddp", "train.run_dir=mine"], run_dir=Path("mine"))
    assert built.argv[-2:] == ("parallel=ddp", "train.run_dir=mine")


def test_what_the_caller_has_set_is_left_alone() -> None:
    built = command(["parallel=ddp"], environment={"OMP_NUM_THREADS": "4"})
    assert "OMP_NUM_THREADS" not in built.environment


def test_deepspeed_keeps_to_the_visible_gpus() -> None:
    words = ["parallel=zero2", "launcher=deepspeed", "cluster.gpus_per_node=2"]
    built = command(words, Machine(gpus=3), environment={"CUDA_VISIBLE_DEVICES": "5,6,7"})
    assert "--include=localhost:5,6" in built.argv
    assert not [word for word in built.argv if word.startswith("--num_gpus")]


def test_an_environment_that_needs_quotes_survives_the_shell() -> None:
    built = Command(argv=("sh", "-c", 'echo "$A-$1"', "x", "b c"), environment={"A": "1 'x'"})
    assert subprocess.check_output(["bash", "-c", built.text()], text=True) == "1 'x'-b c\n"


def run_module(
    *words: str, cwd: Path, module: str = "launch", python: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs an entry point as a program.

    python: interpreter to use, also by its launchers; None: fork a process that has imported torch.
    """
    own = {"PATH": os.environ["PATH"]} if python else {}
    return subprocess.run(
        [python or programs().python, "-m", module, *words],
        cwd=cwd,
        env=programs().environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **own, **environment),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("module", ["launch", "trainer"])
@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"], ["--info"]])
def test_answers_are_instant(module: str, flag: list[str], tmp_path: Path) -> None:
    """These answers load neither training libraries nor the estimator, which are slow to import."""
    done = run_module(*flag, cwd=tmp_path, module=module, python=PYTHON, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "parallel" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"omegaconf", "trainer.rules"} <= loaded
    slow = {
        "torch",
        "numpy",
        "transformers",
        "tokenizers",
        "accelerate",
        "deepspeed",
        "wandb",
        "trainer.estimate.estimate",
    }
    assert not slow & loaded


def test_help_names_every_group_and_fits_half_a_page(tmp_path: Path) -> None:
    text = run_module("--help", cwd=tmp_path).stdout
    parallel = next(line for line in text.splitlines() if line.startswith("  parallel "))
    assert {"ddp", "zero3", "3d"} <= set(parallel.split())
    assert "tiny*" in text
    assert len(text.splitlines()) < 35


def test_cfg_shows_what_the_words_give(tmp_path: Path) -> None:
    shown = run_module("train.steps=7", "--cfg", "job", "parallel=zero2", cwd=tmp_path)
    assert "steps: 7\n" in shown.stdout
    assert "zero_stage: 2\n" in shown.stdout


def test_dry_run_prints_plan_and_command_and_makes_nothing(tmp_path: Path) -> None:
    done = run_module("experiment=demo", "cluster.device=cpu", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("world      2 = 1 node(s) x 2 process(es) on cpu")
    last = done.stdout.splitlines()[-1]
    start = "torchrun --rdzv-backend=loopback --nproc-per-node=2 -m trainer"
    assert f"{start} experiment=demo cluster.device=cpu train.run_dir=" in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("launcher", "word"), [("torchrun", "node-rank"), ("deepspeed", "node_rank")])
def test_several_nodes_get_one_command_each_and_nothing_starts(launcher: str, word: str, tmp_path: Path) -> None:
    done = run_module("parallel=ddp", "cluster.nodes=3", "cluster.device=cpu", f"launcher={launcher}", cwd=tmp_path)
    note, *lines = done.stdout.splitlines()[-4:]
    assert [f" --{word}={rank} " in line and "=NODE_0 " in line for rank, line in enumerate(lines)] == [True] * 3
    assert len({line.split("train.run_dir=")[1] for line in lines}) == 1
    assert ("HOSTFILE a file with a line `ADDRESS slots=2` for each node" in note) == (launcher == "deepspeed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["launch", "trainer"])
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.stpes=3"], "train.stpes=3: no such key; did you mean train.steps?"),
        (["train.steps=0"], "train.steps=0: must be 1 or more"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--config-dir", "/nowhere"], "--config-dir=/nowhere: no such folder"),
    ],
)
def test_a_mistake_costs_one_line(module: str, words: list[str], problem: str, tmp_path: Path) -> None:
    done = run_module(*words, cwd=tmp_path, module=module)
    assert done.returncode == 2
    assert done.stderr.startswith(problem)
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_one_process_of_a_plan_of_two_is_turned_away(tmp_path: Path) -> None:
    done = run_module("parallel=ddp", "data=synthetic", cwd=tmp_path, module="trainer")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("parallel=ddp: the plan has 2 processes, python -m trainer is one; start it with")
    assert not list(tmp_path.iterdir())


WORLD = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_mistake_is_reported_by_one_rank_of_a_node(tmp_path: Path) -> None:
    ranks = [
        run_module("train.steps=0", "parallel=ddp", cwd=tmp_path, module="trainer", RANK=rank, **WORLD, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [len(rank.stderr.splitlines()) for rank in ranks] == [1, 0]


def test_the_local_rank_that_deepspeed_appends_is_no_override(tmp_path: Path) -> None:
    done = run_module("dry_run=true", "--local_rank=0", cwd=tmp_path, module="trainer")
    assert done.returncode == 0


def test_runs_of_a_sweep_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["-m", "train.seed=1,2", "parallel=ddp", f"train.run_dir={folder}", "dry_run=true"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"train.run_dir={folder}: 2 runs of the sweep would share this folder; leave it out")
    assert not said.out
    assert main(["-m", "parallel=ddp", f"train.run_dir={folder}1,{folder}2", "dry_run=true"]) == 0
    assert main(["-m", "parallel=ddp,single", f"train.run_dir={folder}-${{parallel.preset}}", "dry_run=true"]) == 0
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(f"# @package _global_\ntrain:\n  run_dir: {folder}\n")
    capsys.readouterr()
    assert main(["-m", "--config-dir", str(tmp_path), "experiment=mine", "parallel=ddp,single", "dry_run=true"]) == 2
    assert "2 runs of the sweep would share this folder" in capsys.readouterr().err


def test_a_sweep_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    done = run_module("-m", "train.steps=5,0,6", "dry_run=true", "parallel=ddp,single", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.count("== run ") == 6
    assert done.stdout.endswith("# == 4 of 6 runs planned, none started\n")
    assert done.stderr.count("train.steps=0: must be 1 or more") == 2
    folders = re.findall(r"(runs/\S+)/(train.steps=\d),(parallel=\w+)", done.stdout)
    assert {name[1:] for name in folders} >= {("train.steps=5", "parallel=ddp"), ("train.steps=6", "parallel=single")}
    assert len({name[0] for name in folders}) == 1


def test_a_sweep_ends_with_a_table(tmp_path: Path) -> None:
    words = [word for word in SHORT if not word.startswith("train.run_dir")]
    lr = "optimizer.lr=-1,1e-3,1e30"  # the first point is refused, and the others run
    done = run_module("-m", lr, "launcher=python", "parallel=single", *words, cwd=tmp_path)
    assert done.returncode == 2
    begin = done.stdout.rindex("\nrun  ")
    titles, refused, finished, failed, *rest = done.stdout[begin + 1 :].splitlines()
    assert re.split(r"\s{2,}", titles) == [*TITLES]
    (folder,) = tmp_path.glob("runs/tiny-sweep-fp32/*/optimizer.lr=0.001")
    name, state, loss, _, speed, memory, place = re.split(r"\s{2,}", finished)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (name, state, loss) == ("optimizer.lr=0.001", "finished", f"{lines[-1]['loss_last']:.4f}")
    assert (tmp_path / place).samefile(folder) and float(speed.replace(",", "")) > 0 and "iB" in memory
    assert failed.startswith("optimizer.lr=1e+30  not through") and failed.endswith("/optimizer.lr=1e+30")
    assert re.split(r"\s{2,}", refused) == ["optimizer.lr=-1", "not begun", *["-"] * 5]
    assert rest[0].startswith("optimizer.lr=-1: optimizer.lr=-1")
    assert rest[1].startswith("optimizer.lr=1e+30: failed at step ") and "not finite" in rest[1]
    assert rest[-1] == "== 1 of 3 runs finished"


SHORT = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "data=synthetic",
    "data.seq_len=16",
    "train.steps=3",
    "train.global_batch_size=8",
    "train.eval_samples=0",
    "train.export=false",
    "cluster.device=cpu",
    "train.run_dir=run",
]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("torchrun")
    done = run_module("launcher=torchrun", "parallel=zero2", *SHORT, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "master_addr is only used" not in done.stderr
    return losses(folder)


@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate"])
def test_the_same_run_under_every_launcher(launcher: str, reference: list[float], tmp_path: Path) -> None:
    # test_lifetimes starts real interpreters under torchrun and deepspeed.
    python = PYTHON if launcher == "accelerate" else None
    done = run_module(f"launcher={launcher}", "parallel=zero2", *SHORT, cwd=tmp_path, python=python)
    assert done.returncode == 0, done.stderr
    assert len(reference) == 3
    assert losses(tmp_path) == reference
    _check_announced(done, f"preparing  {launcher} starts 2 process(es)")


def _check_announced(done: subprocess.CompletedProcess[str], *started: str) -> None:
    """Checks that the plan is printed first and only once, and that one rank announces each preparation step once."""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("world      ") and done.stdout.count("world      ") == 1
    said = [line for line in lines if line.startswith("preparing")]
    assert said == [*started] + [
        f"preparing  {what}"
        for what in (
            "importing torch and transformers",
            "predicting the memory",
            f"joining {2 if started else 1} process(es)",
            "reading the data",
            "building the model",
        )
    ]


def test_one_plain_process_needs_no_launcher(tmp_path: Path) -> None:
    done = run_module("launcher=python", "parallel=single", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path)) == 3
    _check_announced(done)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_a_mistake_that_only_the_ranks_can_see(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    started = time.monotonic()
    words = [f"launcher={launcher}", "parallel=ddp", "data=files", "data.paths=[broken.jsonl]"]
    done = run_module(*words, *SHORT[:3], *SHORT[4:], cwd=tmp_path)
    assert done.returncode != 0
    assert "broken.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("broken.jsonl") == 1
    assert time.monotonic() - started < 120
