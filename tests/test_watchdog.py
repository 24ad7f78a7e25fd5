"""A hanging rank ends the job: the message names the rank and its activity, and the stacks of all ranks are saved."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

import trainer.run.loop
from configs.errors import EXIT_FAILED
from configs.schema import Config
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import words
from trainer.__main__ import main
from trainer.process.status import read_status

MINUTES = 0.25
STUCK_AT = 3


def overrides(folder: Path, layout: str) -> list[str]:
    quiet = ("logging.progress=off", "cluster=cpu", "checkpoint.final=false", f"train.timeout_minutes={MINUTES}")
    return words("gpt2", layout, "fp32", 50, *quiet, f"train.run_dir={folder}")


def start_and_get_stuck(words: list[str], rank: int, way: str) -> int:
    """Run the trainer; one rank hangs in step STUCK_AT, asleep in its own code or stopped by SIGSTOP."""
    if int(os.environ["RANK"]) == rank:
        lr_at = trainer.run.loop.lr_at

        def slow(config: Config, step: int) -> float:
            if step == STUCK_AT:
                if way == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
            return lr_at(config, step)

        trainer.run.loop.lr_at = slow
    code = main(words)
    assert code == 0, f"exit code {code}"
    return code


@pytest.mark.parametrize(
    ("rank", "way", "blamed"),
    [
        (1, "asleep", r"rank 1 has not moved for \d+ s in data, at .*test_watchdog\.py:\d+ \(slow\)"),
        (0, "stopped", r"rank 0 does not answer at all"),
    ],
)
def test_a_stuck_rank_is_named_by_the_one_that_waits(rank: int, way: str, blamed: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed, match=f"rank {rank}: hung or died"):
        run_ranks(2, start_and_get_stuck, overrides(run, "ddp"), rank, way, timeout=60)
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("failed", EXIT_FAILED)
    reason = str(status["reason"])
    assert reason.startswith(f"stuck for {MINUTES:g} min: ")
    assert re.search(blamed, reason), reason
    stacks = (run / "logs" / f"stacks-rank-{1 - rank:05d}.txt").read_text()
    assert "in all_reduce" in stacks
    assert f"rank {1 - rank} waits in all_reduce during forward and backward" in reason
    if way == "asleep":
        assert "in slow" in (run / "logs" / f"stacks-rank-{rank:05d}.txt").read_text()


def test_a_lone_process_that_hangs_ends_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = time.monotonic()
    with pytest.raises(RankFailed, match=f"exit code {EXIT_FAILED}"):
        run_ranks(1, start_and_get_stuck, overrides(run, "single"), 0, "asleep")
    assert time.monotonic() - before < 90
    assert "in slow" in (run / "logs" / "stacks-rank-00000.txt").read_text()
