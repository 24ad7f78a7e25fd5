"""Ranks fail together, and loader processes survive the signals that are meant for the trainer."""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import re
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import trainer.data.build
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, DataError, RankProblem
from configs.load import load_config
from launch.estimate import main as memory_estimate
from tests.support.data_cases import data_of, rows_of, step_rows, words, write_corpus, write_jsonl
from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from trainer.checkpoint.__main__ import main as checkpoint_main
from trainer.data.build import build_data
from trainer.data.loader import next_item
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.process.status import RunStatus, read_status


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def build_on_rank(overrides_by_rank: list[list[str]]) -> list[str]:
    """Builds the data in a real process group. Returns the problems that this rank reports."""
    rank = int(os.environ["RANK"])
    config = load_config(["parallel=ddp", "cluster.device=cpu", "data.seq_len=16", *overrides_by_rank[rank]])
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1):
        try:
            # Each rank acts as the first rank of its own node.
            build_data(config, plan, data_rank=rank, vocab_size=512, local_rank=0)
        except DataError as error:
            return list(error.problems)
    return []


def test_all_ranks_fail_when_one_does(files: list[str], tmp_path: Path) -> None:
    absent = [*files, f"data.paths=[{tmp_path}/absent.txt]"]
    answers = run_ranks(2, build_on_rank, [files, absent])
    assert answers[0] == answers[1]
    assert answers[0][0].startswith(f"rank 1: data.paths={tmp_path}/absent.txt: no such file or folder")


def test_ranks_with_different_text_are_refused(files: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "other.jsonl", [words(i) for i in range(101)])
    answers = run_ranks(2, build_on_rank, [files, [*files, f"data.paths=[{tmp_path}/other.jsonl]"]])
    assert answers[0] == answers[1]
    assert answers[0][0].startswith("data: rank 1 has other text than rank 0")


# Loader processes and signals


def test_loader_processes_leave_signals_to_the_trainer(files: list[str]) -> None:
    steps = data_of(*files, "data.num_workers=2").steps()
    expected = step_rows(data_of(*files), steps=40)
    assert rows_of(next(steps)[0]) == expected[0]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid or 0, number)
        send_from_elsewhere(worker.pid or 0, signal.SIGTERM)
    assert [rows_of(step[0]) for step in islice(steps, 39)] == expected[1:]
    assert all(worker.is_alive() for worker in workers)
    # SIGTERM from their parent process ends them. The interpreter's exit relies on that.
    started = time.monotonic()
    for worker in workers:
        worker.terminate()
        worker.join(timeout=30)
    assert time.monotonic() - started < 20
    assert not any(worker.is_alive() for worker in workers)


def send_from_elsewhere(pid: int, number: signal.Signals) -> None:
    sender = os.fork()
    if sender == 0:
        os.kill(pid, number)
        os._exit(0)
    os.waitpid(sender, 0)


class Broken:
    """A loader that fails. with_processes: whether its items come from loader processes."""

    def __init__(self, error: Exception, *, with_processes: bool) -> None:
        self.error, self._workers = error, [1] * with_processes

    def __iter__(self) -> Broken:
        return self

    def __next__(self) -> None:
        raise self.error


def test_a_loader_process_that_dies_while_it_hands_over_is_named() -> None:
    reset = ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(RuntimeError, match=r"^DataLoader worker died"):
        next_item(Broken(reset, with_processes=True))
    for error, with_processes in ((reset, False), (EOFError("Caught EOFError in DataLoader worker process 0."), True)):
        with pytest.raises(type(error)) as caught:
            next_item(Broken(error, with_processes=with_processes))
        assert caught.value is error


def test_the_record_of_a_failure_is_not_cut_off_by_a_loader_s_death(tmp_path: Path) -> None:
    class Failure(Exception):
        def __str__(self) -> str:
            os.kill(os.getpid(), signal.SIGCHLD)
            return "first of all"

    def handler(_number: int, _frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(Failure), RunStatus(tmp_path, 0):
            raise Failure
    finally:
        signal.signal(signal.SIGCHLD, before)
    status = read_status(tmp_path)
    assert (status["state"], status["reason"]) == ("failed", "rank 0: Failure: first of all")


# Loader processes and the machine


def enter_little_shared_memory(size: str) -> bool:
    """Gives this process its own /dev/shm. Returns false if the machine does not permit it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()) == 0


def train_in_little_shared_memory(run_dir: str) -> list[str] | None:
    """Returns the entry point's refusal and the messages of a rank whose /dev/shm fills up later or is already full."""
    if not enter_little_shared_memory("64k"):
        return None
    said = io.StringIO()
    words = ["data=synthetic", "data.num_workers=2", "train.steps=1", f"train.run_dir={run_dir}", "cluster.device=cpu"]
    with contextlib.redirect_stderr(said):
        assert run_trainer(words) == EXIT_BAD_CONFIG
    trainer.data.build.check_workers = lambda *_: None
    for size, left in ((2048, None), (16, 0)):
        data = data_of("data=synthetic", "data.num_workers=2", f"data.seq_len={size}", "train.micro_batch_size=4")
        if left is not None:
            Path("/dev/shm/full").write_bytes(bytes(os.statvfs("/dev/shm").f_bavail * 4096))
        try:
            next(data.steps())
        except RankProblem as error:
            print(*error.problems, sep="\n", file=said)
    return [line for line in said.getvalue().splitlines() if line.startswith("data.")]


def test_too_little_shared_memory_is_said_at_once(tmp_path: Path) -> None:
    (said,) = run_ranks(1, train_in_little_shared_memory, str(tmp_path / "run"), timeout=240)
    if said is None:
        pytest.skip("this machine does not let a process have a /dev/shm of its own")
    before, during, full = said
    assert re.match(
        r"data\.num_workers=2: the batches of 2 loader process\(es\) take .* and /dev/shm has 64 KiB", before
    )
    for line in (during, full):
        assert line.startswith("data.num_workers: /dev/shm has no room for what a loader process hands over (")
        assert line.endswith("make it larger (docker run --shm-size=1g, or --ipc=host), or set data.num_workers=0")


def test_more_loader_processes_than_the_machine_carries() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with pytest.raises(DataError) as caught:
            data_of("data=synthetic", "data.num_workers=100")
    finally:
        os.sched_setaffinity(0, allowed)
    assert caught.value.problems == (
        "data.num_workers=100: 100 loader processes for 1 rank(s) on a machine with 1 CPU(s); set data.num_workers=8 or"
        " less",
    )


def train_without_a_tokenizer(folder: str) -> list[list[str]]:
    """Trains a model folder that has only a config on synthetic data, and exports its checkpoint."""
    words = [f"model.path={folder}", "data=synthetic", "data.seq_len=16", "train.steps=1", "cluster.device=cpu"]
    assert (
        run_trainer([*words, f"train.run_dir={folder}/run", "checkpoint.every=1", "train.eval_samples=0"])
        == EXIT_FINISHED
    )
    assert checkpoint_main(["export", f"{folder}/run", f"{folder}/out"]) == EXIT_FINISHED
    return [sorted(path.name for path in Path(folder, place).iterdir()) for place in ("run/model", "out")]


def test_synthetic_data_needs_no_tokenizer(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    ((run, out),) = run_ranks(1, train_without_a_tokenizer, str(tmp_path), timeout=240)
    assert run == out == ["config.json", "generation_config.json", "model.safetensors"]
    words = [f"model.path={tmp_path}", "data=synthetic", "data.seq_len=16", f"data.cache_dir={tmp_path}/cache"]
    assert memory_estimate([*words, "parallel=ddp", "cluster=8xh100"]) == EXIT_FINISHED
