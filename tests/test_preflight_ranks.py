"""Checks that all ranks make together before anything is built."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import CookbookError
from configs.load import load_config
from tests.support.harness import run_ranks
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine, find_machine
from trainer.process.runtime import join_world
from trainer.run.preflight_ranks import MARK, Rank, _compare, _count, _room, _slowest, check_ranks, wanted

WORDS = ["cluster=cpu", "parallel=ddp", "cluster.gpus_per_node=2"]
ROOM = ("optimizer=adamw", "optimizer=sgd", "optimizer=adafactor", "optimizer=adamw_8bit", "tuning=lora tuning.rank=1")
RANK = Rank(host="n1", local_rank=0, versions={"torch": "2.13"}, gpu="H100", seconds=1.0, nvme=None)


def ask(words: list[str], folders: list[str]) -> list[str]:
    """Return the problems that this rank reports, given its own path of the run folder."""
    config = load_config(words)
    plan = make_plan(config, find_machine())
    with join_world(plan, timeout_minutes=1) as runtime:
        try:
            return check_ranks(config, plan, runtime, Path(folders[int(os.environ["RANK"])]))
        except CookbookError as error:
            return list(error.problems)


def test_ranks_that_agree(tmp_path: Path) -> None:
    nvme = ["parallel=zero3_nvme", f"parallel.offload.nvme_path={tmp_path}"]
    lines, same = run_ranks(2, ask, [*WORDS, *nvme], [str(tmp_path)] * 2)
    assert lines[0].startswith("preflight  2 ranks on 1 node(s) agree; 0.0 GiB of ")
    assert "all-reduce of 4 MiB over 2 ranks: " in lines[1]
    assert float(lines[1].split(": ")[1].split()[0]) > 0
    assert lines[2].strip().startswith("slowest rank ")
    assert lines[3].strip().startswith(f"{tmp_path} writes ")
    assert len(same) == 4
    assert not list(tmp_path.iterdir()), "the marks go away"


def test_a_folder_that_is_not_shared(tmp_path: Path) -> None:
    """Two processes act as two nodes; each sees its own folder under the same name."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ["cluster=cpu", "parallel=ddp", "cluster.gpus_per_node=1", "cluster.nodes=2"]
    found = run_ranks(2, ask_as_first_of_a_node, words, [str(tmp_path / name) for name in ("a", "b")])
    assert found[0] == found[1]
    assert [line.split(": ", 1)[0] for line in found[0]] == [f"train.run_dir={tmp_path / name}" for name in ("a", "b")]
    assert all("does not see what other nodes write there; choose a folder" in line for line in found[0])
    assert not list(tmp_path.glob(f"*/{MARK}*"))


def ask_as_first_of_a_node(words: list[str], folders: list[str]) -> list[str]:
    os.environ["LOCAL_RANK"] = "0"
    return ask(words, folders)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """Free space is checked last, so the missing folder is reported."""
    (line,) = run_ranks(2, ask, WORDS, [str(tmp_path), str(tmp_path / "gone")])[0][:1]
    assert line.startswith(f"train.run_dir={tmp_path / 'gone'}: ")


def test_no_room_for_checkpoints(tmp_path: Path) -> None:
    found = run_ranks(2, ask, [*WORDS, "checkpoint.keep_last=1000000000"], [str(tmp_path)] * 2)
    assert found[0] == found[1]
    (line,) = found[0]
    assert line.startswith(f"train.run_dir={tmp_path}: ")
    assert "GiB are free, the checkpoints take" in line
    assert "(checkpoint.keep_last=1000000000," in line


def test_the_room_is_that_of_what_is_saved(tmp_path: Path) -> None:
    """Each checkpoint has float32 parameters and optimizer state; the exported model is added once."""
    parameters, kept = 804_992, 1 + load_config([]).checkpoint.keep_last
    needed = {words: _room(load_config(["model=tiny", *words.split()]), tmp_path)[0] for words in ROOM}
    assert needed["optimizer=adamw"] == 4 * parameters * (3 * kept + 1)
    assert needed["optimizer=sgd"] == 4 * parameters * (2 * kept + 1)
    assert 1 < needed["optimizer=adafactor"] / (4 * parameters * (kept + 1)) < 1.02, "rows and columns"
    # The embedding's states stay in 32 bits, and so do those of 13 norms and of matrices below 4,096 values.
    assert needed["optimizer=adamw_8bit"] < needed["optimizer=adamw"] * 0.6
    assert needed["tuning=lora tuning.rank=1"] < needed["optimizer=adamw"] / 50


def test_who_differs_is_named() -> None:
    older = replace(RANK, host="n7", versions={"torch": "2.12"}, gpu="A100")
    lines = list(_compare([RANK, older, RANK]))
    assert lines == [
        "cluster: torch is 2.13 on most ranks, but 2.12 on n7; use the same everywhere",
        "cluster: GPU is H100 on most ranks, but A100 on n7; use the same everywhere",
    ]
    assert not list(_compare([RANK, RANK]))


def test_the_planned_number_on_each_node() -> None:
    plan = make_plan(load_config([*WORDS, "cluster.nodes=2"]), Machine())
    two = [RANK, replace(RANK, local_rank=1)]
    assert not list(_count([*two, *(replace(rank, host="n2") for rank in two)], plan))
    lines = list(_count([*two, RANK, replace(RANK, host="n2")], plan))
    assert lines[0].startswith("cluster.gpus_per_node=2: 3 ranks run on n1;")


def test_the_slowest_is_named() -> None:
    line = _slowest([RANK, replace(RANK, host="n4", seconds=2.0), RANK])
    assert line == "slowest rank 1 on n4: 2.00 times the median's time for the same work: every step waits for it"


@pytest.mark.parametrize(("nodes", "asked", "is_wanted"), [(1, "null", False), (2, "null", True), (2, "false", False)])
def test_when_it_is_asked(nodes: int, asked: str, is_wanted: bool) -> None:
    config = load_config([*WORDS, f"cluster.nodes={nodes}", f"launcher.preflight={asked}"])
    assert wanted(config, make_plan(config, Machine())) == is_wanted
