"""A checkpoint saved under any layout goes on under any other: the resharding matrix.

Every layout trains three steps and saves. Every layout then goes on from such checkpoints, its own included, with a
freshly built engine and on its own number of processes. With every change it goes on from its own, from one process's
and from its neighbour's, so that each layout is written and read across a border; all pairs are nightly.

Losses and gradient norms of the next steps are those of the single process that was never interrupted. A tied
embedding, accumulation, clipping and a vocabulary that does not divide are in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Overrides, composes, run_ranks
from tests.support.parity import words
from tests.support.resuming import Journal, resume_each, train_and_save
from tests.support.selection import rows

SAVED, STEPS = 3, 6
# layout -> processes
TORCH = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4, "tensor": 2, "pipeline": 2, "tensor_fsdp": 4, "pipeline_fsdp": 4}
ZERO = {"zero1": 2, "zero2": 2, "zero3": 2, "zero3_offload": 2, "zero2_tensor": 4}
# One row each: on three ranks no matrix divides evenly.
FORWARDS = {"hsdp": 1}  # per step; 12 sequences do not divide by 4 data-parallel ranks times 2
ODD = {"fsdp on 3": ("fsdp", 3), "zero3 on 3": ("zero3", 3)}
FLOAT64, FLOAT32 = 1e-10, 1e-5


def overrides(layout: str, precision: str) -> list[str]:
    batch = ("train.global_batch_size=12", f"train.gradient_accumulation_steps={FORWARDS.get(layout, 2)}")
    return words("gpt2", layout, precision, STEPS, *batch, f"checkpoint.every={SAVED}", "checkpoint.final=false")


def save_all(layouts: dict[str, int], precision: str, folder: Path) -> Journal:
    """One run folder per layout with a checkpoint of step 3. Returns the journal of the single process's whole run."""
    for layout, processes in layouts.items():
        run_ranks(processes, train_until_saved, overrides(layout, precision), str(folder / layout))
    never_saved = [*overrides("single", precision), "checkpoint.every=0"]
    return run_ranks(1, train_and_save, never_saved, f"{folder} uninterrupted")[0]


@composes
def train_until_saved(words: Overrides, folder: str) -> Journal:
    return train_and_save(words, folder, upto=SAVED)


def some_or_all(layouts: Iterable[str]) -> list[Any]:
    """(layout, whether it goes on from all others) for each layout. All are nightly."""
    return rows(product(layouts, (False, True)), lambda _, every: not every)


def neighbour(layout: str, layouts: Iterable[str], away: int = 1) -> str:
    names = list(layouts)
    at = names.index(layout) if layout in names else [*TORCH, *ZERO].index(layout)
    return names[(at + away) % len(names)]


def go_on_from_each(
    layout: str, processes: int, precision: str, sources: Collection[str], folder: Path, whole: Journal
) -> dict[str, float]:
    """Checkpoint's layout -> largest relative difference of the next losses and gradient norms."""
    sources = sorted(sources)
    journals = run_ranks(
        processes,
        resume_each,
        overrides(layout, precision),
        [str(folder / source) for source in sources],
        STEPS - SAVED,
        timeout=280,
    )[0]
    return {source: apart(journal, whole) for source, journal in zip(sources, journals, strict=True)}


def apart(found: Journal, expected: Journal) -> float:
    assert list(found.losses) == list(range(SAVED + 1, STEPS + 1))
    pairs = [(found.losses[step], expected.losses[step]) for step in found.losses]
    pairs += [(found.grad_norms[step], expected.grad_norms[step]) for step in found.losses]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Journal]:
    folder = tmp_path_factory.mktemp("float64")
    return folder, save_all(TORCH, "fp64", folder)


@pytest.fixture(scope="module")
def single_precision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Journal]:
    folder = tmp_path_factory.mktemp("float32")
    return folder, save_all({**TORCH, **ZERO}, "fp32", folder)


@pytest.mark.parametrize(("layout", "every"), some_or_all(TORCH))
def test_torch_layouts_go_on_from_each_other(layout: str, every: bool, exact: tuple[Path, Journal]) -> None:
    sources = {*TORCH} if every else {layout, "single", neighbour(layout, TORCH)}
    found = go_on_from_each(layout, TORCH[layout], "fp64", sources, *exact)
    assert max(found.values()) <= FLOAT64, found


@pytest.mark.parametrize(("layout", "every"), some_or_all(ZERO))
def test_zero_goes_on_from_every_layout(layout: str, every: bool, single_precision: tuple[Path, Journal]) -> None:
    sources = {*TORCH, *ZERO} if every else {layout, neighbour(layout, ZERO), neighbour(layout, TORCH, -1)}
    found = go_on_from_each(layout, ZERO[layout], "fp32", sources, *single_precision)
    assert max(found.values()) <= FLOAT32, found


@pytest.mark.parametrize(("layout", "every"), some_or_all(TORCH))
def test_every_layout_goes_on_from_zero(layout: str, every: bool, single_precision: tuple[Path, Journal]) -> None:
    sources = {*ZERO} if every else {neighbour(layout, ZERO)}
    found = go_on_from_each(layout, TORCH[layout], "fp32", sources, *single_precision)
    assert max(found.values()) <= FLOAT32, found


def test_every_layout_is_written_and_read_across_a_border() -> None:
    assert {neighbour(layout, TORCH) for layout in TORCH} == TORCH.keys()
    assert {neighbour(layout, ZERO) for layout in TORCH} == {neighbour(layout, ZERO) for layout in ZERO} == ZERO.keys()


@pytest.mark.parametrize("row", ODD)
def test_another_number_of_processes(row: str, single_precision: tuple[Path, Journal]) -> None:
    layout, processes = ODD[row]
    found = go_on_from_each(layout, processes, "fp32", {"single", "fsdp", "zero3"}, *single_precision)
    assert max(found.values()) <= FLOAT32, found


@pytest.mark.parametrize(
    ("words", "precision", "limit", "others"),
    [
        ("optimizer=adafactor optimizer.lr=0.02", "fp64", FLOAT64, ["tensor"]),
        ("optimizer=adamw_8bit", "fp64", FLOAT64, ["tensor"]),
        ("optimizer=schedule_free scheduler=constant", "fp64", FLOAT64, ["fsdp"]),
        ("optimizer=custom optimizer.target=torch.optim.NAdam", "fp64", FLOAT64, ["tensor"]),
        ("optimizer=muon optimizer.options.dtype=float64", "fp64", FLOAT64, ["fsdp", "tensor", "pipeline"]),
        ("tuning=lora optimizer.lr=0.003", "fp32", 10 * FLOAT32, ["fsdp", "tensor", "zero2", "zero3"]),
    ],
)
def test_other_states_go_on_exactly(
    words: str, precision: str, limit: float, others: list[str], tmp_path: Path
) -> None:
    """Adafactor's rows, columns and vectors, codes and scales of 8-bit AdamW, NAdam's numbers, Muon's momentum,
    adapters alone, on more processes and on fewer."""
    extra = words.split()
    layouts = {"single": 1, **dict.fromkeys(others, 2)}
    for layout, processes in layouts.items():
        run_ranks(processes, train_until_saved, [*overrides(layout, precision), *extra], str(tmp_path / layout))
    never_saved = [*overrides("single", precision), *extra, "checkpoint.every=0"]
    whole = run_ranks(1, train_and_save, never_saved, f"{tmp_path} uninterrupted")[0]
    folders = [str(tmp_path / layout) for layout in layouts]
    for layout, processes in layouts.items():
        both = [*overrides(layout, precision), *extra]
        journals = run_ranks(processes, resume_each, both, folders, STEPS - SAVED)[0]
        assert max(apart(journal, whole) for journal in journals) <= limit
        if layout == "single":
            assert all(journals[0].lines[step] == whole.lines[step] for step in journals[0].lines), "not the same bits"
