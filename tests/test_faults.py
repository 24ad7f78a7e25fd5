"""The fault-counting script injects one kind of fault, reports a fault that is not survived, and writes its table."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.benchmarks import faults
from tests.benchmarks.faults import COMMAND, Fault, count, main, table
from tests.support.fault_cases import Bench
from tests.support.measured import write

C14 = "| C14 | order of writes and flushes, against power cuts | 1 of 1 | 0 | 2026-01-31 |"


def test_flipped_bits_are_counted_and_written_to_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- measured: {COMMAND} -->\n{C14}\n| C6 | old |\n<!-- end of measured -->\nafter\n")
    assert main(["--counts", "one", "--only", "C6", "--write", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    (row,) = (line for line in lines if line.startswith("| C6 "))
    assert row.startswith("| C6 | one bit flipped anywhere in a checkpoint | 1 of 1 | ")
    assert lines[lines.index(row) + 1] == C14, "what was not tried again stays, in the order of the kinds"


def test_a_fault_that_is_not_survived_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    strikes = iter([True, False, True])

    def strike(bench: Bench) -> None:
        assert next(strikes), "step 3 was trained twice"

    fault = Fault(name="C0", what="planted", strike=strike, few=3, nightly=3)
    counted = count(fault, 3, Bench(tmp_path, random.Random(0)))
    assert [failure.splitlines()[0] for failure in counted.failures] == ["AssertionError: step 3 was trained twice"]
    assert "| C0 | planted | 2 of 3 | 5 |" in table([counted], seed=5)
    strikes = iter([True, False, True])
    monkeypatch.setattr(faults, "FAULTS", [fault])
    assert main([]) == 1
    assert "C0: AssertionError: step 3 was trained twice" in capsys.readouterr().out


def test_a_page_without_the_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="has no line"):
        write(page, COMMAND, "table\n")
    assert page.read_text() == "nothing here\n"
