"""The supervisor's decisions, with stubs of srun and scontrol that follow a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from slurm.job import Job, folder, read_job_status, write_job
from trainer.checkpoint.catalog import CHECKPOINTS, step_name
from trainer.process.status import STATUS

ROOT = Path(__file__).parent.parent
# Plan of a start: "CODE STATE STEP". The state `stopped` waits for the file STOP, as ranks do.
SRUN = """#!{python}
import json, os, pathlib, sys, time
run = pathlib.Path(sys.argv[-4])
with open(run / "srun.txt", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
number = len((run / "srun.txt").read_text().splitlines())
plan = (run / "plan.txt").read_text().splitlines()
code, state, step = plan[min(number, len(plan)) - 1].split()
def note(state):
    (run / "{status}").write_text(json.dumps(dict(state=state, number=number, **word)))
word = {{}}
if state == "silent":
    time.sleep(600)
if state == "unseen":
    sys.exit(int(code))
note("running")
if state == "stopped":
    while not (run / "STOP").exists():
        time.sleep(0.02)
    (run / "STOP").unlink()
if int(step):
    (run / "{checkpoints}" / f"step-{{int(step):08d}}").mkdir(parents=True, exist_ok=True)
word = dict(exit_code=int(code), reason="so it was asked")
note(state)
sys.exit(1 if int(code) and state != "stopped" else 0)
"""
SCONTROL = """#!{python}
import pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1\\nn2")
else:
    with open(pathlib.Path(__file__).parent / "requeued.txt", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
    import os, signal
    os.kill(os.getppid(), signal.SIGKILL)
"""


def job(**changed: object) -> Job:
    base: dict[str, object] = {
        "words": ["first"],
        "again": ["later"],
        "launcher": "torchrun",
        "launcher_args": [],
        "device": "cpu",
        "nodes": 2,
        "processes": 2,
        "python": sys.executable,
        "srun": ["--exclusive"],
        "chain": False,
        "max_restarts": 2,
        "max_requeues": 5,
        "start_minutes": 1.0,
        "stuck_minutes": 0.05,
        "goes_on": "python -m launch again",
    }
    return Job(**{**base, **changed})  # type: ignore[arg-type]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text.format(python=sys.executable, status=STATUS, checkpoints=CHECKPOINTS))
        (programs / name).chmod(0o755)
    folder(tmp_path / "a run").mkdir(parents=True)
    return tmp_path / "a run"


def start(run_dir: Path, *plan: str, restarts: int = 0, **changed: object) -> subprocess.Popen[str]:
    """Start the supervisor.

    plan: one line for each start of the ranks, see SRUN.
    restarts: number of times that Slurm has requeued the job.
    """
    (run_dir / "plan.txt").write_text("\n".join(plan))
    write_job(run_dir, job(**changed))
    environment = {
        **os.environ,
        "PATH": f"{run_dir.parent / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "3",
    }
    words = [sys.executable, "-m", "slurm.supervise", str(run_dir)]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def supervise(run_dir: Path, *plan: str, restarts: int = 0, **changed: object) -> tuple[int, str]:
    with start(run_dir, *plan, restarts=restarts, **changed) as running:
        try:
            said, _ = running.communicate(timeout=60)
        finally:
            running.kill()
    return running.returncode, said


def starts(run_dir: Path) -> list[list[str]]:
    path = run_dir / "srun.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def state(run_dir: Path) -> str:
    return json.loads((folder(run_dir) / "status.json").read_text())["state"]


def wait_for(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_start(run_dir: Path, number: int = 1) -> None:
    wait_for(lambda: len(starts(run_dir)) >= number and (run_dir / STATUS).exists())


def test_the_words_of_a_step(run_dir: Path) -> None:
    assert supervise(run_dir, "0 finished 10")[0] == EXIT_FINISHED
    (words,) = starts(run_dir)
    *options, python, module, agent, path, address, port, number = words
    assert options == [
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=60"),
        *("--cpus-per-task=3", "--exclusive"),
    ]
    assert (python, module, agent, path, address, number) == (
        sys.executable, "-m", "slurm.agent", str(run_dir), "n1", "1",
    )  # fmt: skip
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not first <= int(port) <= last, "the kernel may give this port to anyone"
    assert (folder(run_dir) / "hostfile").read_text() == "n1 slots=2\nn2 slots=2\n"


def test_ranks_that_die_are_started_again_while_that_helps(run_dir: Path) -> None:
    code, said = supervise(run_dir, "1 failed 10", "1 failed 20", "1 failed 30", "0 finished 40")
    assert code == EXIT_FINISHED
    assert said.count("slurm: restarting: so it was asked; starting again from step") == 3
    assert [words[-1] for words in starts(run_dir)] == ["1", "2", "3", "4"]
    assert len({words[-2] for words in starts(run_dir)}) == 4, "a port was used twice"
    assert state(run_dir) == "finished"


def test_a_job_that_always_dies_is_given_up(run_dir: Path) -> None:
    code, said = supervise(run_dir, "1 failed 10", max_restarts=1)
    assert code == EXIT_FAILED
    assert len(starts(run_dir)) == 2
    assert "given up after 1 restarts in a row from step 10" in said
    assert state(run_dir) == "failed"


def test_what_somebody_has_to_mend_is_not_tried_again(run_dir: Path) -> None:
    assert supervise(run_dir, f"{EXIT_BAD_CONFIG} failed 0")[0] == EXIT_BAD_CONFIG
    assert len(starts(run_dir)) == 1


def test_a_step_that_hangs_at_the_start_is_ended(run_dir: Path) -> None:
    code, said = supervise(run_dir, "0 silent 0", "0 finished 10", start_minutes=0.01)
    assert code == EXIT_FINISHED
    assert "the ranks have not met after 0.01 minutes" in said


def test_the_time_limit_comes_near(run_dir: Path) -> None:
    running = start(run_dir, "75 stopped 10")
    with running:
        wait_for_start(run_dir)
        running.send_signal(signal.SIGUSR1)
        said, _ = running.communicate(timeout=60)
    assert "slurm: requeued: step 10 is saved; back to the queue" in said
    assert (run_dir.parent / "bin/requeued.txt").read_text() == "requeue 77\n"
    assert not (run_dir / "STOP").exists()
    assert state(run_dir) == "requeued"


@pytest.mark.parametrize(
    ("changed", "restarts", "code", "reason"),
    [
        ({"chain": True}, 0, EXIT_STOPPED, "step 10 is saved; the next job of the array goes on"),
        (
            {},
            5,
            EXIT_FAILED,
            "the job was requeued 5 times (cluster.slurm.max_requeues=5); step 10 is saved; goes on with: ",
        ),
    ],
)
def test_the_time_limit_where_there_is_no_way_back(
    changed: dict[str, object], restarts: int, code: int, reason: str, run_dir: Path
) -> None:
    running = start(run_dir, "75 stopped 10", restarts=restarts, **changed)
    with running:
        wait_for_start(run_dir)
        running.send_signal(signal.SIGUSR1)
        said, _ = running.communicate(timeout=60)
    assert reason in said
    assert running.returncode == code
    assert not (run_dir.parent / "bin/requeued.txt").exists()


def test_jobs_that_are_always_stopped_before_a_checkpoint_end(run_dir: Path) -> None:
    """This happens under a time limit that is shorter than a start."""
    requeues = run_dir.parent / "bin/requeued.txt"
    number, said = 0, ""
    for number in range(1, 9):
        running = start(run_dir, "75 stopped 10", restarts=number - 1, max_requeues=100)
        with running:
            wait_for_start(run_dir, number)
            running.send_signal(signal.SIGUSR1)
            said, _ = running.communicate(timeout=60)
        if running.returncode == EXIT_FAILED:
            break
    assert "2 jobs in a row were stopped without a new checkpoint since step 10" in said
    assert number == 3
    assert len(requeues.read_text().splitlines()) == 2


def test_asked_to_end_by_slurm(run_dir: Path) -> None:
    """SIGTERM means scancel, or a lost node, after which Slurm requeues the job. Nothing is started again, and the
    message is correct in both cases."""
    running = start(run_dir, "75 stopped 10")
    with running:
        wait_for_start(run_dir)
        running.send_signal(signal.SIGTERM)
        # The state is written before the ranks end, which may take longer than Slurm lets the supervisor live.
        wait_for(lambda: read_job_status(run_dir)["state"] == "stopping")
        (run_dir / "STOP").touch()
        said, _ = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED
    way_on = "unless Slurm requeues the job itself, goes on with: python -m launch again\n"
    assert said.endswith(f"slurm: stopped: SIGTERM from Slurm; step 10 is saved; {way_on}")
    assert len(starts(run_dir)) == 1


def test_a_stop_file_of_a_person_ends_the_job(run_dir: Path) -> None:
    running = start(run_dir, "75 stopped 10")
    with running:
        wait_for_start(run_dir)
        (run_dir / "STOP").touch()
        said, _ = running.communicate(timeout=60)
    assert running.returncode == EXIT_STOPPED
    assert state(run_dir) == "stopped"
    assert said.endswith("slurm: stopped: so it was asked; step 10 is saved; goes on with: python -m launch again\n")
    assert not (run_dir.parent / "bin/requeued.txt").exists()


def test_a_finished_run_is_left_alone(run_dir: Path) -> None:
    (run_dir / STATUS).write_text(json.dumps({"state": "finished"}))
    assert supervise(run_dir, "1 failed 0") == (EXIT_FINISHED, "slurm: finished: the run is finished\n")
    assert not starts(run_dir)


def test_a_chain_that_was_given_up_stays_so(run_dir: Path) -> None:
    assert supervise(run_dir, "1 failed 0", chain=True, max_restarts=0)[0] == EXIT_FAILED
    assert supervise(run_dir, "0 finished 0", chain=True, max_restarts=0)[0] == EXIT_FAILED
    assert len(starts(run_dir)) == 1


def test_a_folder_that_cannot_be_seen(run_dir: Path) -> None:
    words = [sys.executable, "-m", "slurm.supervise", str(run_dir / "elsewhere")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_BAD_CONFIG
    assert done.stderr.startswith(f"train.run_dir={run_dir / 'elsewhere'}: cannot be read on this node")
    assert done.stderr.count("\n") == 1


def test_the_run_folder_of_a_lost_incarnation_is_waited_for(run_dir: Path) -> None:
    """A disconnected node keeps running, and its ranks hold the folder until their collectives time out."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, pathlib; from trainer.process.status import lock;"
         "lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(3)", str(run_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, said = supervise(run_dir, "0 finished 10", stuck_minutes=1.0)
    assert code == EXIT_FINISHED
    assert "waiting for the ranks of an earlier start to end" in said


def test_what_is_remembered_is_a_whole_file(run_dir: Path) -> None:
    supervise(run_dir, "0 finished 10")
    assert not list(folder(run_dir).glob(".*"))
    assert json.loads((folder(run_dir) / "job.json").read_text()) == asdict(job())
    assert step_name(10) in [path.name for path in (run_dir / CHECKPOINTS).iterdir()]
