"""From the configuration to sbatch's arguments: requested resources and refusals. Slurm is not needed: stub programs
record their arguments."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from configs.errors import CookbookError
from configs.load import load_config
from configs.schema import Config
from launch.__main__ import main
from launch.jobs import launch_array, launch_job, plan_job
from slurm.agent import node_environment
from slurm.control import living_job
from slurm.job import read_job
from slurm.options import check_options, limit_seconds, sbatch_arguments
from slurm.submit import make_job, script_text

BASE = ("cluster=slurm", "cluster.device=cpu", "cluster.nodes=2", "cluster.gpus_per_node=4", "parallel=ddp")
PROGRAM = """#!{python}
import json, sys
from pathlib import Path
with open(Path(__file__).with_suffix(".json"), "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "--parsable" in sys.argv:
    print("4711;cluster")
"""


def configured(*words: str) -> Config:
    return load_config([*BASE, *words])


def options(*words: str) -> list[str]:
    config = configured(*words)
    return sbatch_arguments(config, plan_job(config), output="log", array=config.cluster.slurm.array)


def problems(*words: str, sweep: bool = False) -> list[str]:
    return list(check_options(configured(*words), sweep=sweep))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with stubs of sbatch and squeue that record their arguments and always succeed."""
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text(PROGRAM.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(slurm: Path, program: str = "sbatch") -> list[list[str]]:
    path = slurm / f"{program}.json"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_key_is_an_option() -> None:
    words = options(
        "cluster.device=cuda",
        "cluster.slurm.account=team",
        "cluster.slurm.partition='gpu,big'",
        "cluster.slurm.qos=high",
        "cluster.slurm.time=1-12:00:00",
        "cluster.slurm.gpu_type=h100",
        "cluster.slurm.cpus_per_node=64",
        "cluster.slurm.mem=0",
        "cluster.slurm.constraint='a100&nvme'",
        "cluster.slurm.dependency='afterok:12:13'",
        "cluster.slurm.sbatch_args=['--exclude=n7', '--exclusive']",
    )
    assert words == [
        "--job-name=tiny-ddp-fp32",
        "--account=team",
        "--partition=gpu,big",
        "--qos=high",
        "--time=1-12:00:00",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gpus-per-node=h100:4",
        "--mem=0",
        "--constraint=a100&nvme",
        "--dependency=afterok:12:13",
        "--signal=B:USR1@180",
        "--output=log",
        "--requeue",
        "--open-mode=append",
        "--exclude=n7",
        "--exclusive",
    ]


def test_ways_to_ask_for_gpus() -> None:
    assert "--gres=gpu:4" in options("cluster.device=cuda", "cluster.slurm.gpu_request=gres")
    assert not [word for word in options("cluster.device=cuda", "cluster.slurm.gpu_request=none") if "gpu" in word]
    assert not [word for word in options() if "gpu" in word or "gres" in word]


def test_jobs_of_a_chain_do_not_requeue() -> None:
    words = options("cluster.slurm.array=1-8%1")
    assert "--array=1-8%1" in words
    assert "--requeue" not in words


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("time=1h", "cluster.slurm.time=1h: not understood by Slurm; write MINUTES, HH:MM:SS or D-HH:MM:SS"),
        ("partition='a b'", "cluster.slurm.partition=a b: not understood by Slurm; write names of `sinfo`"),
        ("account=-x", "cluster.slurm.account=-x: not understood by Slurm"),
        ("qos='a;b'", "cluster.slurm.qos=a;b: not understood"),
        ("job_name='x\\ny'", "cluster.slurm.job_name=x"),
        ("mem=lots", "cluster.slurm.mem=lots: not understood by Slurm; write megabytes"),
        ("dependency=12", "cluster.slurm.dependency=12: not understood"),
        ("array=1-8", "cluster.slurm.array=1-8: not understood by Slurm; write 1-8%1"),
        ("array=%4", "cluster.slurm.array=%4: one run takes 1-8%1"),
        ("container='a b'", "cluster.slurm.container=a b: not understood"),
        ("container_mounts=['/a:/b']", "cluster.slurm.container_mounts: has no effect without cluster.slurm.container"),
        ("sbatch_args=['exclusive']", "cluster.slurm.sbatch_args=[exclusive]: each is one word, --option"),
        ("sbatch_args=['--time=5']", "cluster.slurm.sbatch_args=[--time=5]: use cluster.slurm.time"),
        ("sbatch_args=['--wrap=id']", "cluster.slurm.sbatch_args=[--wrap=id]: use cluster.slurm.script"),
        ("script=nowhere.sh", "cluster.slurm.script=nowhere.sh: no such file"),
    ],
)
def test_what_slurm_would_not_understand(word: str, problem: str) -> None:
    (line,) = problems(f"cluster.slurm.{word}")
    assert line.startswith(problem)
    assert "\n" not in line


def test_a_warning_that_takes_most_of_the_time() -> None:
    (line,) = problems("cluster.slurm.time=5", "cluster.slurm.signal_seconds=151")
    assert line.startswith("cluster.slurm.signal_seconds=151: more than half of cluster.slurm.time=5")
    assert not problems("cluster.slurm.time=5", "cluster.slurm.signal_seconds=150")


def test_this_machine_says_nothing_about_the_nodes() -> None:
    found = list(check_options(load_config(["cluster=slurm"])))
    assert found[0].startswith("cluster.gpus_per_node=null: ")
    found = list(check_options(load_config(["cluster.kind=slurm", "cluster.gpus_per_node=8"])))
    assert found[0].startswith("cluster.device=auto: ")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("1-0", 86400), ("2-03", 183600), ("1-01:30", 91800),
     ("1-00:00:01", 86401), ("x", None)],
)  # fmt: skip
def test_forms_of_a_time_limit(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_what_is_submitted(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*BASE, "train.resume=never", "train.run_dir=50% done"]
    assert launch_job(load_config(words), words, config_dir=None) == (0, False)
    asked, submitted = given(slurm)
    assert (asked[0], submitted[0]) == ("--test-only", "--parsable")
    assert asked[1:] == submitted[1:]
    run_dir = slurm / "50% done"
    assert f"--output={slurm}/50%% done/logs/slurm-%j.out" in submitted
    assert submitted[-3:] == [str(files("slurm") / "job.sbatch"), str(run_dir), sys.executable]
    job = read_job(run_dir)
    assert job.words == [*BASE, "train.resume=never", f"train.run_dir='{run_dir}'"]
    assert job.again == [*BASE, "train.resume=auto", f"train.run_dir='{run_dir}'"]
    assert load_config(job.words).train.run_dir == str(run_dir)
    said = capsys.readouterr().out
    assert "submitted  job 4711\n" in said
    assert f"follow     tail -F '{run_dir}/logs/slurm-4711.out'\n" in said
    assert living_job(run_dir) is None


def test_the_folder_that_a_job_starts_in_does_not_decide_what_is_imported(slurm: Path) -> None:
    """The real batch script runs on a finished run, in a folder with a user's `slurm.py` and other modules."""
    words = [*BASE, "train.steps=1", "train.run_dir=run", "cluster.slurm.setup=['export PYTHONPATH=$PWD/mine']"]
    assert launch_job(load_config(words), words, config_dir=None) == (0, False)
    (slurm / "run/status.json").write_text(json.dumps({"state": "finished", "step": 1}))
    for name in ("slurm.py", "trainer.py", "json.py"):
        (slurm / name).write_text("raise SystemExit('the working directory was imported')\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = ["bash", *given(slurm)[-1][-3:]]
    done = subprocess.run(command, cwd=slurm, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "slurm: finished: the run is finished\n"), done.stderr


def test_dry_run_shows_everything_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    words = [*BASE, "dry_run=true", "cluster.device=cuda", "cluster.gpu=A100-SXM4-40GB"]
    words += ["cluster.slurm.setup=[module load cuda]", "cluster.slurm.container=/images/ours.sqsh"]
    assert launch_job(load_config(words), words, config_dir=None) == (0, False)
    said = capsys.readouterr().out
    for part in (
        "world      8 = 2 node(s) x 4 process(es) on cuda",
        "memory ",
        "\nsbatch --job-name=",
        "#!/usr/bin/env bash",
        "\nslurm/setup.sh  module load cuda\n",
        "\nsrun            --container-image=/images/ours.sqsh\n",
    ):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_no_sbatch_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CookbookError, match=r"^cluster\.kind=slurm: there is no sbatch on PATH; run this on a login"):
        launch_job(configured(), BASE, config_dir=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("train.run_dir=/dev/shm/run", r"^train\.run_dir=/dev/shm/run: lies in this machine's memory \(tmpfs\)"),
        ("train.run_dir='a\\\\b'", r": Slurm cannot write a log there; use a path without backslashes$"),
        ("cluster.gpus_per_node=3 parallel.dp_replicate=4", r"4 = 4, but there are 6 processes"),
    ],
)
def test_a_run_that_cannot_be_a_job(word: str, problem: str, slurm: Path) -> None:
    words = [*BASE, *word.split()]
    with pytest.raises(CookbookError, match=problem):
        launch_job(load_config(words), words, config_dir=None)
    assert not given(slurm)


ROOT = Path(__file__).parent.parent


def test_a_world_around_the_job_is_not_the_ranks_world() -> None:
    config = configured("launcher=deepspeed", "parallel=zero1")
    job = make_job(config, plan_job(config), [], config_dir=None, run_dir=Path("/x"))
    environment = node_environment(job, {"WORLD_SIZE": "64", "RANK": "3", "MASTER_ADDR": "evil", "HOME": "/root"})
    assert environment == {
        "HOME": "/root",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "COOKBOOK_QUIET_STOP": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(ROOT),
    }


def test_containers_are_srun_s() -> None:
    config = configured(
        "cluster.slurm.container=nvcr.io/a:1",
        "cluster.slurm.container_mounts=['/data:/data', '/runs:/runs']",
        "cluster.slurm.python=python3",
        "cluster.slurm.srun_args=['--container-writable']",
    )
    job = make_job(config, plan_job(config), [], config_dir=None, run_dir=Path("/x"))
    assert job.srun == [
        "--container-image=nvcr.io/a:1",
        "--container-mounts=/data:/data,/runs:/runs",
        "--container-writable",
    ]
    assert job.python == "python3"


def test_a_sweep_as_one_array(slurm: Path) -> None:
    base = [*BASE, "cluster.slurm.array=%3", "train.run_dir=sweep"]
    assert launch_array([[*base, f"train.seed={seed}"] for seed in range(5)], config_dir=None) == 0
    submitted = given(slurm)[-1]
    assert "--array=0-4%3" in submitted
    assert f"--output={slurm}/sweep/%a/logs/slurm-%A_%a.out" in submitted
    assert submitted[-3:] == [str(slurm / "sweep"), sys.executable, "sweep"]
    assert [read_job(slurm / f"sweep/{number}").words[-2] for number in range(5)] == [
        f"train.seed={n}" for n in range(5)
    ]
    goes_on = shlex.split(read_job(slurm / "sweep/3").goes_on)
    assert goes_on[:3] == ["python", "-m", "launch"]
    config = load_config(goes_on[3:])
    assert (config.cluster.slurm.array, config.train.seed) == (None, 3), "a point goes on alone"
    assert config.train.run_dir == str(slurm / "sweep/3")
    assert (slurm / "sweep/3/slurm/jobs.txt").read_text() == "4711_3\n"


def test_a_dry_run_of_an_array_shows_it_all(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [*BASE, "cluster.slurm.array=%3", "train.run_dir=sweep", "dry_run=true"]
    assert launch_array([[*base, f"train.seed={seed}"] for seed in range(2)], config_dir=None) == 0
    shown = capsys.readouterr().out
    assert shown.count("world      8 = 2 node(s) x 4 process(es) on cpu") == 2
    assert "\nsbatch --job-name=" in shown
    assert shown.endswith(script_text(configured()))
    assert not given(slurm)
    with pytest.raises(CookbookError, match=r"cluster\.slurm\.time=long: not understood by Slurm"):
        launch_array([[*base, "cluster.slurm.time=long"]], config_dir=None)


def test_a_sweep_without_an_array_is_a_job_for_each_point(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *BASE, "train.seed=1,2"]) == 0
    assert capsys.readouterr().out.endswith("\n== 2 of 2 jobs submitted\n")
    submissions = [words for words in given(slurm) if "--test-only" not in words]
    assert len({words[-2] for words in submissions}) == len(submissions) == 2, "a run folder for each"


def test_points_that_need_different_jobs_are_no_array(slurm: Path) -> None:
    base = [*BASE, "cluster.slurm.array=%3", "train.run_dir=sweep"]
    with pytest.raises(CookbookError, match=r"point 1 asks Slurm for --nodes=4, which an array has in common"):
        launch_array([base, [*base, "cluster.nodes=4"]], config_dir=None)
    assert not (slurm / "sweep").exists()
