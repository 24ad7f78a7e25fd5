"""Faults of whole runs, started by their real entry points: processes that die, hang, are asked to stop, or collide.

As in `fault_cases`, each case injects one fault and raises AssertionError if the run does not survive it.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from launch.process import rank_processes
from tests import test_checkpoint_run as runs
from tests import test_launch_restarts as jobs
from tests import test_watchdog as stuck
from tests.support import entry_points, resuming
from tests.support.fault_cases import STEPS, Bench, plain, saved
from tests.support.harness import RankFailed, run_ranks
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.checkpoint.manifest import MANIFEST, TOKENIZER, entry_of, read_manifest, write_manifest
from trainer.process.status import read_status

MIB = 2**20


def second_writer(bench: Bench) -> None:
    """C15: a second start in the same folder is refused, and the refusal names the first run.

    A folder whose owner was killed is taken over.
    """
    run = bench.place() / "run"
    long = runs.overrides(run, "train.steps=5000", "checkpoint.every=2", layout="single")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_ranks, 1, entry_points.run_trainer, long, timeout=300)
        _wait_for(lambda: committed(run / CHECKPOINTS), first.done)
        pid = int(str(read_status(run)["pid"]))
        ((code, (line,)),) = run_ranks(1, runs.start_and_listen, long)
        assert code == EXIT_BAD_CONFIG, line
        assert f"a run is going on in it (host {socket.gethostname()}, pid {pid})" in line, line
        psutil.Process(pid).kill()
        with pytest.raises(RankFailed):
            first.result()
    reached = int(committed(run / CHECKPOINTS)[-1].name.removeprefix("step-"))
    further = runs.overrides(run, f"train.steps={reached + 2}", "checkpoint.every=2", layout="single")
    assert run_ranks(1, entry_points.run_trainer, further) == [EXIT_FINISHED]


def hostile(bench: Bench) -> None:
    """C16: a pickle replaces any file and the manifest matches it, or the manifest points outside of the checkpoint.

    Neither a resume nor an export executes the pickle or reads a file outside of the checkpoint.
    """
    run, marker = bench.place() / "run", bench.place() / "executed"
    checkpoint = run / CHECKPOINTS / step_name(STEPS)
    shutil.copytree(saved(bench), checkpoint)
    manifest = read_manifest(checkpoint)
    name = bench.random.choice([*manifest.files, MANIFEST, "../../../outside.safetensors"])
    (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    if name != MANIFEST:
        (checkpoint / MANIFEST).unlink()
        entry = entry_of(checkpoint / name)
        write_manifest(checkpoint, replace(manifest, files={**manifest.files, name: entry}))
    # A resume does not read the tokenizer's files: it uses those of the run.
    with nullcontext() if name.startswith(TOKENIZER) else pytest.raises(RankFailed):
        run_ranks(1, resuming.train_and_save, plain("single", f"train.steps={STEPS + 1}"), str(run))
    # An export fails unless transformers accepts the tokenizer's files; the pickle must not run then either.
    run_ranks(1, entry_points.export_if_it_can, str(checkpoint), str(run / "exported"))
    assert not marker.exists(), f"{name} was executed"


@dataclass(frozen=True)
class Payload:
    marker: Path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def killed_process(bench: Bench) -> None:
    """P1: a rank, the launcher or a loader process is killed, without restarts.

    The exit code is 1, the message names the process, and the other processes end. The same command then resumes, and
    its results equal those of an undisturbed run.
    """
    place, rank = bench.place(), bench.random.randrange(2)
    whom = bench.random.choice(["rank", "launcher", "loader"])
    words = (*jobs.overrides("ddp", "data.num_workers=1"), "cluster.gpus_per_node=2", "launcher.max_restarts=0")
    job = jobs.launch(place, *words)
    jobs.wait_for(job, place / "run" / CHECKPOINTS / step_name(jobs.EVERY))
    below = psutil.Process(job.pid).children(recursive=True)
    ranks = {int(process.environ()["RANK"]): process for process in rank_processes(psutil.Process(job.pid))}
    victims = {"rank": ranks[rank], "launcher": psutil.Process(ranks[0].ppid()), "loader": ranks[rank].children()[-1]}
    victims[whom].kill()
    _, errors = job.communicate(timeout=120)
    assert job.returncode == EXIT_FAILED, f"{whom}: {errors}"
    assert not [process for process in below if process.is_running()], f"{whom}: left running"
    died = {
        "rank": f"rank {rank} was killed by SIGKILL",
        "launcher": "the launcher was killed by SIGKILL",
        "loader": f"rank {rank}: RuntimeError: DataLoader worker",
    }
    status = read_status(place / "run")
    assert (status["state"], str(status["reason"]).startswith(died[whom])) == ("failed", True), status
    again = jobs.launch(place, *words)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == EXIT_FINISHED, errors
    assert jobs.journal(place / "run") == jobs.left_alone("ddp"), whom


def hung(bench: Bench) -> None:
    """P3: a rank is stopped by a signal, or sleeps, while the other waits for it."""
    way = bench.random.choice(["stopped", "asleep"])
    stuck.test_a_stuck_rank_is_named_by_the_one_that_waits(
        rank := bench.random.randrange(2),
        way,
        rf"rank {rank} " + ("does not answer at all" if way == "stopped" else "has not moved"),
        bench.place(),
    )


def signalled_while_saving(bench: Bench) -> None:
    """P5: SIGTERM arrives as a slow save begins, SIGKILL after the grace time, during or after the save."""
    run, enough = bench.place() / "run", bench.random.random() < 0.5
    step, words = bench.random.choice([3, 6, 9]), runs.overrides(run, layout="single")
    save, grace = 3.0, 60.0 if enough else 1.5
    if enough:
        assert run_ranks(1, entry_points.start_with_slow_save, words, step, save, grace) == [EXIT_STOPPED]
        assert read_status(run)["state"] == "stopped"
    else:
        with pytest.raises(RankFailed, match="died"):
            run_ranks(1, entry_points.start_with_slow_save, words, step, save, grace)
    kept = [path.name for path in committed(run / CHECKPOINTS)]
    assert (step_name(step) in kept) is enough, kept
    assert enough or step == 3 or step_name(step - 3) in kept, kept
    assert run_ranks(1, entry_points.run_trainer, words) == [EXIT_FINISHED]
    assert runs.comparable_metrics(run) == _left_alone(bench, "single")


def without_memory(bench: Bench) -> None:
    """P6: RLIMIT_AS gives one of two ranks less memory than it needs."""
    run, rank = bench.place() / "run", bench.random.randrange(2)
    large = ("model.config.vocab_size=400000", "train.global_batch_size=2", "train.eval_samples=0")
    limit = bench.random.randrange(20, 80) * MIB
    with pytest.raises(RankFailed, match=f"exit code {EXIT_FAILED}"):
        run_ranks(
            2, entry_points.start_and_exhaust_in_training, _overrides("ddp", run, *large), rank, limit, timeout=300
        )
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["retry"]) == ("failed", EXIT_FAILED, False), status
    assert re.match(rf"rank {rank}: out of memory after \d updates?: [^\n]*$", str(status["reason"])), status


def started_at_once(bench: Bench, starts: int) -> None:
    """P7: runs of two ranks each start at once on one host, under torchrun and deepspeed.

    starts: number of runs.
    """
    place, launchers = bench.place(), ("torchrun", "deepspeed")
    started = []
    for number in range(starts):
        folder = place / str(number)
        folder.mkdir()
        launcher = launchers[number % 2]
        words = (*jobs.overrides("ddp"), f"train.seed={number}", "cluster.gpus_per_node=2")
        started.append(jobs.launch(folder, f"launcher={launcher}", *words, "train.steps=20", "launcher.max_restarts=0"))
    errors = [job.communicate(timeout=120 + 60 * starts)[1] for job in started]
    assert [job.returncode for job in started] == [EXIT_FINISHED] * starts, errors
    # A rank that joined another run would have the losses of that run's seed.
    first = [jobs.journal(place / str(number) / "run")[0] for number in range(starts)]
    assert all([step for step, *_ in steps] == list(range(1, 21)) for steps in first)
    assert len({steps[0][1] for steps in first}) == starts, "two runs with the same losses"


def port_taken(bench: Bench) -> None:
    """P7: another process listens on the rendezvous port. One line names the port, and nothing is started."""
    jobs.test_a_port_that_is_taken_is_named_before_anything_starts(bench.place())


def clock_jumps(bench: Bench) -> None:
    """P8: the wall clock jumps back and forth by hours, in the ranks and in the process that supervises them."""
    run = bench.place() / "run"
    words = runs.overrides(run, "train.timeout_minutes=0.5", layout="single")
    assert run_ranks(1, entry_points.start_with_jumping_clock, words, bench.random.random()) == [EXIT_FINISHED]
    assert runs.comparable_metrics(run) == _left_alone(bench, "single")
    place, seed = bench.place(), bench.random.random()
    driver = f"import random, time; draw, real = random.Random({seed}), time.time\n"
    driver += "time.time = lambda: real() + draw.uniform(-1e5, 1e5)\n"
    job = jobs.start(place, sys.executable, "-c", driver + jobs.driver(place, pause=0.01, cap=2))
    _, errors = job.communicate(timeout=120)
    assert (job.returncode, errors.count("restart: ")) == (EXIT_FAILED, 2), errors


def asked_to_stop(bench: Bench) -> None:
    """P4: one rank gets a signal, once or several times. All ranks exit with code 75, and the same command resumes."""
    place, rank = bench.place(), bench.random.randrange(2)
    sent = signal.Signals[bench.random.choice(["SIGTERM", "SIGINT", "SIGUSR1"])]
    times = 1 if sent == signal.SIGINT else bench.random.choice([1, 2, 10])
    run, after = place / "run", bench.random.choice([3, 6, 9])
    codes = run_ranks(2, runs.start, runs.overrides(run), rank, (sent,) * times, str(run), after)
    assert codes == [EXIT_STOPPED] * 2, f"{sent.name} x {times} on rank {rank}: {codes}"
    assert run_ranks(2, runs.start, runs.overrides(run)) == [EXIT_FINISHED] * 2
    assert runs.comparable_metrics(run) == _left_alone(bench, "ddp")


def failing(bench: Bench) -> None:
    """P2: one rank raises an exception. The status file names the rank and the error."""
    run, rank = bench.place() / "run", bench.random.randrange(2)
    where = bench.random.choice(["the loop", "the backward"])
    with pytest.raises(RankFailed):
        run_ranks(2, entry_points.start_and_fail, _overrides("ddp", run), rank, where)
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAILED)
    assert str(status["reason"]) == f"rank {rank}: ZeroDivisionError: planted in {where}", status


def not_finite(bench: Bench) -> None:
    """P9: the loss is not finite. Either all ranks stop without a restart, or all skip the updates and continue."""
    run, way = bench.place() / "run", bench.random.choice(["stop", "skip"])
    more = ("optimizer.lr=1e35", "train.steps=12", f"train.non_finite={way}", "train.export=false")
    codes = run_ranks(2, entry_points.run_trainer, _overrides("fsdp", run, *more))
    assert codes == [EXIT_FAILED if way == "stop" else EXIT_FINISHED] * 2, codes
    assert way == "skip" or read_status(run)["retry"] is False


def _overrides(layout: str, run: Path, *more: str) -> list[str]:
    return [*plain(layout), "cluster=cpu", "logging.progress=off", f"train.run_dir={run}", *more]


def _left_alone(bench: Bench, layout: str) -> list[tuple[object, ...]]:
    alone = bench.folder / f"alone-{layout}"
    if not alone.exists():
        processes = 1 if layout == "single" else 2
        assert (
            run_ranks(processes, entry_points.run_trainer, runs.overrides(alone, layout=layout))
            == [EXIT_FINISHED] * processes
        )
    return runs.comparable_metrics(alone)


def _wait_for(there, over) -> None:
    deadline = time.monotonic() + 120
    while not there():
        assert not over(), "the first run has ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)
