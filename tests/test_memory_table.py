"""The script that measures on a GPU, run on the CPU: its cases, its table, the page it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_config
from tests.gpu.memory_table import BEGIN, END, FAKE_RANKS, Row, cases, main, measure_fake, render, write
from trainer.machine import Machine
from trainer.memory.estimate import Verdict
from trainer.plan import make_plan

ROOT = Path(__file__).parent.parent


def test_a_real_run_fills_the_table_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}Not yet measured.\n{END}after\n")
    one = " ".join(next(words for words in cases("cpu") if {"parallel=zero3", "optimizer=sgd"} <= set(words)))
    assert main(["--device", "cpu", "--only", one, "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}after\n") and "Not yet measured" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| tiny zero3 bf16"))
    assert abs(float(row.split("|")[4].strip().rstrip("%"))) < 10
    assert "- allocated: median" in text and "- reserved" not in text


@pytest.mark.parametrize(("rank", "world_size", "words"), FAKE_RANKS["cpu"])
def test_a_rank_without_its_neighbours_needs_what_is_predicted(
    rank: int, world_size: int, words: list[str], tmp_path: Path
) -> None:
    row = measure_fake(rank, world_size, words, tmp_path)
    assert row.measured and row.error == pytest.approx(0, abs=0.05)


def test_gpu_cases_are_plans() -> None:
    for rank, world_size, words in FAKE_RANKS["cuda"]:
        machine = Machine(gpus=world_size, world_size=world_size, local_world_size=world_size)
        assert rank < make_plan(load_config(words), machine).world_size == world_size
    found = list(cases("cuda"))
    assert len(found) == len({tuple(words) for words in found}) > 100
    for words in found[::13]:  # passes through every choice; all of them would take a minute
        assert make_plan(load_config(words), Machine(gpus=1)).world_size == 1


def test_what_ran_out_of_memory_unforeseen_is_named() -> None:
    row = Row(
        case="a",
        verdict=Verdict.fits,
        predicted=2**30,
        predicted_reserved=2**31,
        measured=None,
        measured_reserved=None,
    )
    text = render([row])
    assert "out of memory though predicted to fit: a\n" in text and "| a | 1.000 | out of memory (fits) |" in text


def test_the_docs_have_a_place_for_the_table_and_claim_nothing_before(tmp_path: Path) -> None:
    text = (ROOT / "docs/memory.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    bare = tmp_path / "bare.md"
    bare.write_text("no markers\n")
    with pytest.raises(ValueError, match="has no lines"):
        write(bare, "table\n")
    assert bare.read_text() == "no markers\n"
