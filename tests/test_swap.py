"""The next start removes the swap files of a killed run; those of a live run stay."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.harness import RankFailed, run_ranks
from tests.support.reports import config_and_plan
from trainer.engine.deepspeed.swap import SwapFolder, remove_dead
from trainer.process.runtime import join_world


def swap(nvme: str, end: str) -> str:
    """Write a swap file like DeepSpeed, then die by SIGKILL, or check that another start keeps the file, and close."""
    _, plan = config_and_plan(None, "parallel=ddp", "cluster.gpus_per_node=2")
    with join_world(plan, timeout_minutes=1) as runtime:
        folder = SwapFolder(nvme, runtime)
        mine = folder.path / "zero_stage_3" / "optimizer" / f"rank{runtime.rank}"
        mine.mkdir(parents=True)
        (mine / "0.tensor.swp").write_bytes(b"moments")
        runtime.sum(0.0)
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        remove_dead(Path(nvme))
        assert (mine / "0.tensor.swp").read_bytes() == b"moments"
        runtime.sum(0.0)
        folder.close()
    return folder.path.name


def test_a_killed_run_leaves_nothing_behind_for_long(tmp_path: Path) -> None:
    foreign = tmp_path / "swap-of-somebody-else"
    foreign.mkdir()
    with pytest.raises(RankFailed):
        run_ranks(2, swap, str(tmp_path), "killed")
    (dead,) = [path for path in tmp_path.glob("swap-*.lock")]
    assert list(dead.with_suffix("").rglob("*.swp"))
    first, second = run_ranks(2, swap, str(tmp_path), "closed")
    assert first == second != dead.stem
    assert list(tmp_path.iterdir()) == [foreign]


def close_at_once(nvme: str, times: int) -> None:
    _, plan = config_and_plan(None, "parallel=ddp", "cluster.gpus_per_node=2")
    with join_world(plan, timeout_minutes=1) as runtime:
        for _ in range(times):
            folder = SwapFolder(nvme, runtime)
            (folder.path / "zero_stage_3" / "optimizer" / f"rank{runtime.rank}").mkdir(parents=True)
            runtime.sum(0.0)
            folder.close()


def test_ranks_that_close_at_once_do_not_trip_over_each_other(tmp_path: Path) -> None:
    run_ranks(2, close_at_once, str(tmp_path), 200)
    assert list(tmp_path.iterdir()) == []
