"""The suite's own machinery: selection of tests, their lanes, results computed once, and the report of times."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import nightly
from tests.spent import COMMAND, KINDS, PAGE, budget, cpu_seconds, kind_of, main
from tests.support import shared
from tests.support.lanes import DIVIDED, LONG, SLURM, WAITING, in_order, unit_of
from tests.support.selection import QUICK_FILES, is_quick
from tests.support.shared import once

ROOT = Path(__file__).parent.parent


def test_every_file_that_is_named_is_there() -> None:
    named = {*WAITING, *LONG, *DIVIDED, *(f"tests/{name}.py" for name in QUICK_FILES)}
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_inner_loop_has_a_row_of_every_axis() -> None:
    row = "tests/test_parity.py::test_layout_equals_single_process[{}-llama]"
    assert all(is_quick(row.format(layout)) for layout in ("ddp", "fsdp", "tensor", "pipeline", "context"))
    assert is_quick("tests/test_config.py::test_anything[1]") and not is_quick(row.format("3d"))


def test_what_waits_comes_first_and_one_cluster_is_one_unit() -> None:
    files = ["tests/test_parity.py", "tests/test_config.py", "tests/slurm/test_jobs.py", "tests/slurm/test_faults.py"]
    nodeids = [f"{file}::test_{number}" for file in files for number in (1, 2)]
    assert [unit_of(nodeid) for nodeid in in_order(nodeids)] == [SLURM] * 4 + [files[1]] * 2 + nodeids[:2]


def counted(name: str, folder: str) -> int:
    with Path(folder, name).open("a") as out:
        out.write("called\n")
    return 7


def test_what_one_lane_has_computed_the_others_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_folder", tmp_path)
    lanes = [once(counted), once(counted)]  # each has its own in-memory cache, like a process
    assert [lane("a", str(tmp_path)) for lane in (*lanes, *lanes)] == [7] * 4
    assert lanes[0]("b", str(tmp_path)) == 7
    assert [(tmp_path / name).read_text() for name in "ab"] == ["called\n"] * 2


def test_the_budget_names_every_kind_and_lane() -> None:
    """The last kind takes the tests that no other kind matches."""
    assert kind_of("tests/slurm/test_faults.py::test_a") == "slurm"
    assert kind_of("tests/test_faults.py::test_a") == "checkpoints"
    assert kind_of("tests/test_new.py::test_a[x]") == list(KINDS)[-1]
    rows = [{"nodeid": "tests/test_parity.py::test_a", "lane": f"gw{lane}", "wall": 60, "cpu": 90} for lane in range(2)]
    head, parity, total, lanes = budget(rows, 90)
    assert (head.split()[:4], parity.split()[:4]) == (
        ["kind", "tests", "clock", "processors"],
        ["parity", "2", "120", "s"],
    )
    assert total.split() == ["all", "2", "120", "s", "180", "s"]
    assert lanes == "1.5 min by the clock, of 30; lanes worked: gw0 60 s, gw1 60 s"


def test_seconds_of_a_process_below_are_counted() -> None:
    before = cpu_seconds()
    subprocess.run(["sh", "-c", "i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done"], check=True)
    assert cpu_seconds() > before


def test_the_nightly_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    outcomes = iter([{"a": "passed", "b": "failed"}, {"b": "passed", "c": "skipped"}])

    def run(*words: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
        if capture:
            return subprocess.CompletedProcess(words, 0, "t.py::a\nt.py::b\nt.py::c\n\n3 tests collected\n")
        left = next(Path(word[1:]) for word in words if word.startswith("@"))
        asked.append(left.read_text().split())
        rows: Iterator[dict[str, str]] = (
            {"nodeid": f"t.py::{name}", "outcome": outcome} for name, outcome in next(outcomes).items()
        )
        spent = next(Path(word.partition("=")[2]) for word in words if word.startswith("--spent="))
        spent.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return subprocess.CompletedProcess(words, len(asked) == 1, "")

    monkeypatch.setattr(nightly, "_pytest", run)
    passed = tmp_path / "commit.txt"
    assert [nightly.run_tests(passed, [], 2) for _ in range(3)] == [1, 0, 0]
    assert asked == [["t.py::a", "t.py::b", "t.py::c"], ["t.py::b", "t.py::c"]]


def test_a_change_that_is_not_committed_is_another_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    author = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, env={**os.environ, **author}, check=True)
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    names = [nightly.commit()]
    for text in ("1", "2"):
        (tmp_path / "file").write_text(text)
        names.append(nightly.commit())
    assert len(set(names)) == 3 and "+" not in names[0]


def test_a_session_becomes_the_table_of_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert PAGE.read_text().count(f"<!-- measured: {COMMAND} -->") == 1
    file = tmp_path / "spent.jsonl"
    row = {"nodeid": "tests/slurm/test_jobs.py::test_a", "lane": "gw0", "wall": 90.0, "cpu": 30.0, "outcome": "passed"}
    file.write_text(f"{json.dumps(row)}\n")
    assert main([str(file)]) == 0
    head, _, slurm, *others = capsys.readouterr().out.strip().splitlines()
    assert head.startswith("| kind | files") and len(others) == len(KINDS) - 1
    assert slurm.startswith("| slurm | `slurm/*` | ") and slurm.endswith(" | 1 | 1.5 min | 0.5 min |")
    assert main([str(file), "--files"]) == 0
    assert capsys.readouterr().out.split() == [
        "30",
        "s",
        "of",
        "processors",
        "90",
        "s",
        "1",
        "tests/slurm/test_jobs.py",
    ]
