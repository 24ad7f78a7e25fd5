"""The same command resumes a run after signals, a STOP file, SIGKILL or a full disk. Runs use the entry point."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import words
from tests.support.selection import rows
from trainer.__main__ import main
from trainer.checkpoint.catalog import CHECKPOINTS, committed, step_name
from trainer.process.status import read_status
from trainer.process.stopping import STOP_FILE

STEPS = 12
SETTINGS = (
    "checkpoint.every=3",
    "train.eval_every=4",
    "logging.progress=off",
    "cluster=cpu",
    "model.config.resid_pdrop=0.1",
)


def overrides(folder: Path, *more: str, layout: str = "ddp") -> list[str]:
    return words("gpt2", layout, "fp32", STEPS, *SETTINGS, f"train.run_dir={folder}", *more)


def start(words: list[str], rank: int = -1, signals: tuple[int, ...] = (), folder: str = "", after: int = 0) -> int:
    """Returns the run's exit code. Process `rank` gets the signals once the checkpoint of step `after` exists."""

    def send() -> None:
        while not (Path(folder) / CHECKPOINTS / step_name(after)).exists():
            time.sleep(0.001)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=send, daemon=True).start()
    return main(words)


def start_and_listen(words: list[str], largest_file: int = resource.RLIM_INFINITY) -> tuple[int, list[str]]:
    """Returns the run's exit code and the lines of its stderr. No file may grow beyond `largest_file` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        return main(words), heard.getvalue().splitlines()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable_metrics(folder: Path) -> list[tuple[Any, ...]]:
    """Returns the metrics that an interruption must not change."""
    keys = ("kind", "step", "loss", "grad_norm", "lr", "tokens", "valid_tokens", "validation_loss", "loss_first")
    return [tuple(line.get(key) for key in keys) for line in metrics(folder) if line["kind"] != "checkpoint"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert run_ranks(2, start, overrides(folder)) == [EXIT_FINISHED] * 2
    assert len(comparable_metrics(folder)) == STEPS + 1 + STEPS // 4 + 1
    assert [line["step"] for line in metrics(folder) if line["kind"] == "checkpoint"] == [3, 6, 9, 12]
    return comparable_metrics(folder)


# SIGINT is nightly here. The test of a second interrupt, below, runs on every change.
@pytest.mark.parametrize(
    ("name", "rank", "times"),
    rows([("SIGTERM", 0, 1), ("SIGINT", 1, 1), ("SIGUSR1", 1, 10)], lambda name, *_: name != "SIGINT"),
)
def test_a_signal_to_one_rank_saves_and_the_same_command_goes_on(
    name: str, rank: int, times: int, left_alone: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    number = signal.Signals[name]
    codes = run_ranks(2, start, overrides(run), rank, (number,) * times, str(run), 3)
    assert codes == [EXIT_STOPPED] * 2
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["reason"]) == ("stopped", EXIT_STOPPED, f"rank {rank}: {name}")
    assert committed(run / CHECKPOINTS)[-1].name == step_name(int(str(status["step"])))
    assert not (run / "summary.json").exists()
    assert run_ranks(2, start, overrides(run)) == [EXIT_FINISHED] * 2
    assert comparable_metrics(run) == left_alone
    assert read_status(run)["state"] == "finished"
    assert (run / "resumed" / "002" / "config.yaml").exists()
    # If a scheduler starts the command once more, it finds nothing to do and changes nothing.
    before = (run / "metrics.jsonl").read_bytes()
    assert run_ranks(2, start, overrides(run)) == [EXIT_FINISHED] * 2
    assert (run / "metrics.jsonl").read_bytes() == before


def test_killed_and_started_under_another_layout(left_alone: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(2, start, overrides(run), 1, (signal.SIGKILL,), str(run), 6)
    assert read_status(run)["state"] in ("running", "failed")
    assert run_ranks(1, start, overrides(run, layout="single")) == [EXIT_FINISHED]
    steps = [(line["kind"], line["step"]) for line in metrics(run) if line["kind"] in ("step", "validation")]
    assert steps == [(kind, step) for kind, step, *_ in left_alone if kind != "summary"]


def test_a_second_interrupt_ends_at_once_and_harms_nothing(left_alone: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=f"exit code -{signal.SIGINT}"):
        run_ranks(1, start_blocked, overrides(run, layout="single"))
    assert run_ranks(1, start, overrides(run, layout="single")) == [EXIT_FINISHED]
    assert [line["step"] for line in metrics(run) if line["kind"] == "step"] == list(range(1, STEPS + 1))


def start_blocked(words: list[str]) -> int:
    """Sends two interrupts while the main thread is inside one long system call, in the middle of a save."""
    rename = os.fsync

    def slow(descriptor: int) -> None:
        rename(descriptor)
        if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(60)

    os.fsync = slow
    return main(words)


def test_a_stop_file_stops_once_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = overrides(run, "train.steps=5000", "checkpoint.every=2", layout="single")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_ranks, 1, start, long)
        while not committed(run / CHECKPOINTS):
            assert not first.done(), first.result()
            time.sleep(0.01)
        before = time.monotonic()
        assert run_ranks(1, start, long) == [EXIT_BAD_CONFIG]
        assert time.monotonic() - before < 60
        (run / STOP_FILE).touch()
        assert first.result() == [EXIT_STOPPED]
    assert str(read_status(run)["reason"]).endswith("STOP is there")
    assert not (run / STOP_FILE).exists()


def test_a_run_goes_on_from_another_runs_checkpoint_and_then_from_its_own(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_ranks(1, start, overrides(first, layout="single")) == [EXIT_FINISHED]
    more = overrides(second, f"train.resume={first}", f"train.steps={STEPS + 4}", layout="single")
    assert run_ranks(1, start, more, 0, (signal.SIGTERM,), str(second), STEPS + 3) in ([EXIT_STOPPED], [EXIT_FINISHED])
    assert run_ranks(1, start, more) == [EXIT_FINISHED]
    assert [line["step"] for line in metrics(second) if line["kind"] == "step"] == list(range(STEPS + 1, STEPS + 5))
    refused = overrides(second, "train.resume=never", layout="single")
    assert run_ranks(1, start, refused) == [EXIT_BAD_CONFIG]
    missing = overrides(tmp_path / "third", f"train.resume={tmp_path / 'nowhere'}", layout="single")
    assert run_ranks(1, start, missing) == [EXIT_BAD_CONFIG]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint but not for two."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no permission to mount: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line(small_disk: Path) -> None:
    run = small_disk / "run"
    ((code, (line,)),) = run_ranks(1, start_and_listen, overrides(run, layout="single"))
    assert code == EXIT_FAILED
    assert re.match(r"checkpoint of step 6: no space for it in .*: needs 2\.9 MiB, has [12]\.\d MiB \(No space", line)
    # The previous checkpoint is complete, and no partial one takes up the remaining space.
    assert [path.name for path in (run / CHECKPOINTS).iterdir()] == [step_name(3)]
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["reason"]) == ("failed", EXIT_FAILED, line)


def test_a_file_that_cannot_be_written_does_not_end_the_run_if_so_configured(tmp_path: Path) -> None:
    run = tmp_path / "run"
    going_on = overrides(run, "checkpoint.on_failure=warn", "train.export=false", layout="single")
    ((code, lines),) = run_ranks(1, start_and_listen, going_on, 2**20)
    assert code == EXIT_FINISHED
    assert [line.endswith("training goes on without it") for line in lines] == [True] * (STEPS // 3)
    assert list((run / CHECKPOINTS).iterdir()) == []
