"""The GPU measurements run on the CPU with tiny shapes: their cases, time limit and tables, and the updated pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configs.load import load_config
from tests.gpu.all import unpacked
from tests.gpu.catalogue import cases
from tests.gpu.child import begin
from tests.gpu.report import markdown, memory
from tests.gpu.write import PAGES, command, main
from tests.support.harness import fork
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

ROOT = Path(__file__).parent.parent
GIB = 2**30


def start(folder: Path, *words: str) -> str:
    """Starts the script as a user does and returns its output."""
    command = [sys.executable, "-m", "tests.gpu.all", "--device", "cpu", "--out", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_case_runs_and_its_tables_go_into_the_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "out", "--minutes", "4")
    file = tmp_path / "out/results.json"
    found = json.loads(file.read_text())
    assert {row["name"]: row["note"] for row in found["results"] if row["status"] != "passed"} == {}
    assert (tmp_path / "out/compared/comparison.md").exists() and list((tmp_path / "out/profile").glob("trace-*"))
    for row in found["results"]:
        if row["part"] == "memory":
            assert row["predicted"]["allocated"] == pytest.approx(row["numbers"]["allocated"], rel=0.05), row["name"]

    docs = tmp_path / "docs"
    docs.mkdir()
    for page in set(PAGES.values()):
        shutil.copy(ROOT / "docs" / page, docs)
    assert main([str(file), "--docs", str(docs)]) == 2  # the results are of a CPU
    assert "the pages speak of GPUs" in capsys.readouterr().err
    assert main([str(file), "--docs", str(docs), "--force"]) == 0
    for part, page in PAGES.items():
        table = (
            (docs / page)
            .read_text()
            .split(f"<!-- measured: {command(part)} -->\n")[1]
            .split("<!-- end of measured -->")[0]
        )
        assert table.startswith("Measured ") and "ot yet measured" not in table
        before = (ROOT / "docs" / page).read_text()
        assert "ot yet measured" in before, "what is written there was measured on a GPU"

    (docs / "memory.md").write_text("no markers\n")
    pages = {page.name: page.read_text() for page in docs.iterdir()}
    assert main([str(file), "--docs", str(docs), "--force"]) == 2
    assert pages == {page.name: page.read_text() for page in docs.iterdir()}


def test_it_stops_in_time_and_says_what_was_not_reached(tmp_path: Path) -> None:
    start(tmp_path, "--minutes", "0.2")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["minutes"] < 2  # the fork server first imports its libraries; all cases would take longer
    assert len(found["results"]) == len(cases("cpu"))
    assert found["results"][-1]["status"] in ("not reached", "out of time")
    assert (tmp_path / "results.md").read_text() == markdown(found)


def test_gpu_cases_are_plans() -> None:
    found = cases("cuda")
    assert len({case.key for case in found}) == len(found) > 80
    assert sum(case.part == "memory" for case in found) >= 40
    for case in found[::6]:  # a sample of every part; all cases would take half a minute
        world = case.options.get("world", 1)
        words = ["data=synthetic", "model=tiny", "cluster.device=cuda", f"cluster.gpus_per_node={world}", *case.words]
        plan = make_plan(load_config(words), Machine(gpus=world, world_size=world, local_world_size=world))
        assert plan.world_size == world > case.options.get("rank", 0)


def test_a_case_whose_library_is_missing_is_skipped_in_one_line(tmp_path: Path) -> None:
    case = replace(cases("cpu")[0], needs="no-such-distribution")
    task = json.dumps({"case": asdict(case), "predicts": False, "device": "cpu"})
    fork(begin, task, str(tmp_path / "result.json"), str(tmp_path / "log")).join(60)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["note"]) == ("skipped", "needs no-such-distribution, which is not installed")
    assert [case.needs for case in cases("cuda") if "fp8" in case.name] == ["torchao"] * 4


def test_what_ran_out_of_memory_unforeseen_is_named() -> None:
    fits = {"allocated": GIB, "reserved": 2 * GIB, "verdict": "fits"}
    rows = [
        {"name": "a", "part": "memory", "status": "out of memory", "numbers": {}, "predicted": fits},
        {"name": "b", "part": "memory", "status": "passed", "numbers": {"allocated": 2 * GIB}, "predicted": fits},
        {"name": "c", "part": "memory", "status": "crashed (exit code -9)", "numbers": {}},
    ]
    text = memory({"results": rows})
    assert "out of memory though predicted to fit: a (of 1)\n" in text and "| b | 1.000 | 2.000 | -50.0% |" in text
    assert "| a (out of memory, predicted: fits) | 1.000 |  |  |" in text and "| c (crashed (exit code -9)) |" in text


def test_wheels_are_importable_without_being_installed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "")
    (folder,) = unpacked(tmp_path, tmp_path / "site")
    assert (Path(folder) / "some_package/__init__.py").exists()
    assert list(unpacked(tmp_path / "none", tmp_path / "site")) == []
