"""A checkpoint saved under any layout goes on under any other: the resharding matrix.

Every layout trains two steps and saves. Every layout then goes on from such checkpoints, its own included, with a
freshly built engine and on its own number of processes. With every change each kind of layout goes on from its own and
from its neighbour's, so that each kind is written and read across a border; what crosses two kinds, and all pairs, are
nightly.

Losses and gradient norms of the next steps are those of the single process that was never interrupted. A tied
embedding, accumulation, clipping and a vocabulary that does not divide are in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import Overrides, composes, run_ranks
from tests.support.parity import words
from tests.support.resuming import Journal, resume_each, train_and_save
from tests.support.selection import rows

SAVED, STEPS = 2, 4
# layout -> processes
TORCH = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4, "tensor": 2, "pipeline": 2, "tensor_fsdp": 4, "pipeline_fsdp": 4}
ZERO = {"zero1": 2, "zero2": 2, "zero3": 2, "zero3_offload": 2, "zero2_tensor": 4}
# One row each: on three ranks no matrix divides evenly.
FORWARDS = {"hsdp": 1}  # per step; 12 sequences do not divide by 4 data-parallel ranks times 2
ODD = {"fsdp on 3": ("fsdp", 3), "zero3 on 3": ("zero3", 3)}
# With every change these kinds are read and written; of torch's, as many read a DeepSpeed kind's as there are of those.
KINDS = ("single", "ddp", "fsdp", "tensor", "pipeline")
KINDS_OF_ZERO = ("zero1", "zero2", "zero3")
READS_ZERO = ("single", "ddp", "fsdp")
FLOAT64, FLOAT32 = 1e-10, 1e-5
ROLES = "optimizer=muon optimizer.options.dtype=float64 optimizer.groups.embedding.name=adafactor"
ROLES += " optimizer.groups.vector.name=sgd"


def overrides(layout: str, precision: str) -> list[str]:
    batch = ("train.global_batch_size=12", f"train.gradient_accumulation_steps={FORWARDS.get(layout, 2)}")
    size = ("model.config.n_layer=2", "train.eval_samples=0")
    return words("gpt2", layout, precision, STEPS, *batch, *size, f"checkpoint.every={SAVED}", "checkpoint.final=false")


class Saved:
    """Run folders with a checkpoint of step 2, made when first asked for, and a single process's uninterrupted run."""

    def __init__(self, precision: str, folder: Path, *extra: str) -> None:
        self.precision, self.folder, self.extra = precision, folder, extra

    def words(self, layout: str) -> list[str]:
        return [*overrides(layout, self.precision), *self.extra]

    def of(self, layout: str) -> str:
        run = self.folder / layout
        if not run.exists():
            run_ranks({**TORCH, **ZERO}[layout], train_until_saved, self.words(layout), str(run))
        return str(run)

    @cached_property
    def whole(self) -> Journal:
        never_saved = [*self.words("single"), "checkpoint.every=0"]
        return run_ranks(1, train_and_save, never_saved, f"{self.folder} uninterrupted")[0]

    def go_on(self, layout: str, processes: int, sources: Iterable[str]) -> dict[str, Journal]:
        """Checkpoint's layout -> the journal of its next steps."""
        folders = {source: self.of(source) for source in sources}
        journals = run_ranks(
            processes, resume_each, self.words(layout), [*folders.values()], STEPS - SAVED, timeout=280
        )[0]
        return dict(zip(folders, journals, strict=True))


@composes
def train_until_saved(words: Overrides, folder: str) -> Journal:
    return train_and_save(words, folder, upto=SAVED)


def some_or_all(layouts: Iterable[str], often: Sequence[str]) -> list[Any]:
    """(layout, whether it goes on from all others) for each layout. All are nightly, and those that are not `often`."""
    return rows(product(layouts, (False, True)), lambda layout, every: not every and layout in often)


def neighbour(layout: str, layouts: Sequence[str], away: int = 1) -> str:
    """The next of `layouts`, in their own order; of one that is not among them, by its place in its own."""
    own = next(each for each in (layouts, KINDS, KINDS_OF_ZERO, [*TORCH, *ZERO]) if layout in each)
    return layouts[(own.index(layout) + away) % len(layouts)]


def apart(found: Journal, expected: Journal) -> float:
    assert list(found.losses) == list(range(SAVED + 1, STEPS + 1))
    pairs = [(found.losses[step], expected.losses[step]) for step in found.losses]
    pairs += [(found.grad_norms[step], expected.grad_norms[step]) for step in found.losses]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def furthest(journals: dict[str, Journal], whole: Journal) -> float:
    """Largest relative difference of the next losses and gradient norms."""
    return max(apart(journal, whole) for journal in journals.values())


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("fp64", tmp_path_factory.mktemp("float64"))


@pytest.fixture(scope="module")
def single_precision(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("fp32", tmp_path_factory.mktemp("float32"))


@pytest.mark.parametrize(("layout", "every"), some_or_all(TORCH, KINDS))
def test_torch_layouts_go_on_from_each_other(layout: str, every: bool, exact: Saved) -> None:
    sources = TORCH if every else {layout, neighbour(layout, KINDS)}
    assert furthest(exact.go_on(layout, TORCH[layout], sorted(sources)), exact.whole) <= FLOAT64


@pytest.mark.parametrize(("layout", "every"), some_or_all(ZERO, KINDS_OF_ZERO))
def test_zero_goes_on_from_every_layout(layout: str, every: bool, single_precision: Saved) -> None:
    sources = {*TORCH, *ZERO} if every else {layout, neighbour(layout, KINDS, 0)}
    found = single_precision.go_on(layout, ZERO[layout], sorted(sources))
    assert furthest(found, single_precision.whole) <= FLOAT32


@pytest.mark.parametrize(
    ("layout", "every"), rows(product(TORCH, (False, True)), lambda layout, every: not every and layout in READS_ZERO)
)
def test_every_layout_goes_on_from_zero(layout: str, every: bool, single_precision: Saved) -> None:
    sources = ZERO if every else {neighbour(layout, KINDS_OF_ZERO)}
    found = single_precision.go_on(layout, TORCH[layout], sorted(sources))
    assert furthest(found, single_precision.whole) <= FLOAT32


def test_every_kind_is_written_and_read_across_a_border() -> None:
    assert {neighbour(layout, KINDS) for layout in KINDS} == {*KINDS} < TORCH.keys()
    assert {neighbour(layout, KINDS_OF_ZERO) for layout in READS_ZERO} == {*KINDS_OF_ZERO} < ZERO.keys()
    assert {neighbour(layout, KINDS, 0) for layout in KINDS_OF_ZERO} <= {*KINDS}


@pytest.mark.parametrize("row", ODD)
def test_another_number_of_processes(row: str, single_precision: Saved) -> None:
    layout, processes = ODD[row]
    found = single_precision.go_on(layout, processes, ["fsdp", "zero3"])
    assert furthest(found, single_precision.whole) <= FLOAT32


EIGHT_BITS = "optimizer=adamw_8bit"
ADAPTERS = "tuning=lora optimizer.lr=0.003"
OTHER_STATES = [
    ("optimizer=adafactor optimizer.lr=0.02", "fp64", FLOAT64, ["tensor"]),
    (EIGHT_BITS, "fp64", FLOAT64, ["tensor"]),
    ("optimizer=schedule_free scheduler=constant", "fp64", FLOAT64, ["fsdp"]),
    ("optimizer=custom optimizer.target=torch.optim.NAdam", "fp64", FLOAT64, ["tensor"]),
    (ROLES, "fp64", FLOAT64, ["tensor"]),
    (ROLES, "fp64", FLOAT64, ["fsdp", "tensor", "pipeline"]),
    (ADAPTERS, "fp32", 10 * FLOAT32, ["zero2"]),
    (ADAPTERS, "fp32", 10 * FLOAT32, ["fsdp", "tensor", "zero2", "zero3"]),
]


# Codes in blocks, which a cut divides; states of several optimizers; adapters alone.
STATES_OFTEN = (EIGHT_BITS, ROLES, ADAPTERS)


@pytest.mark.parametrize(
    ("words", "precision", "limit", "others"),
    rows(OTHER_STATES, lambda words, _precision, _limit, others: words in STATES_OFTEN and len(others) == 1),
)
def test_other_states_go_on_exactly(
    words: str, precision: str, limit: float, others: list[str], tmp_path: Path
) -> None:
    """Adafactor's rows, columns and vectors, codes and scales of 8-bit AdamW, NAdam's numbers, Muon's momentum with
    other optimizers of roles, adapters alone, on more processes and on fewer: each layout from its own and from the
    next one's."""
    saved = Saved(precision, tmp_path, *words.split())
    layouts = ["single", *others]
    for layout, after in zip(layouts, [*others, "single"], strict=True):
        found = saved.go_on(layout, {**TORCH, **ZERO}[layout], [layout, after])
        assert furthest(found, saved.whole) <= limit
        if layout == "single":
            lines = found[layout].lines
            assert all(lines[step] == saved.whole.lines[step] for step in lines), "not the same bits"
