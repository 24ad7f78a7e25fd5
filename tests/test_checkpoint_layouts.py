"""A checkpoint saved under any layout resumes under any other: the resharding matrix.

Every layout trains two steps and saves. Every layout then resumes from such checkpoints, its own included, with a
freshly built engine and on its own number of processes. On every change, each kind of layout resumes from its own
checkpoint and from its neighbour's, so each kind's checkpoint is read by another kind and each kind reads another's.
Layouts that combine two kinds, and all pairs, run nightly.

Losses and gradient norms of the next steps equal those of an uninterrupted single process. All runs have a tied
embedding, accumulation, clipping and a vocabulary size that does not divide evenly.
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
# layout -> number of processes
TORCH = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4, "tensor": 2, "pipeline": 2, "tensor_fsdp": 4, "pipeline_fsdp": 4}
ZERO = {"zero1": 2, "zero2": 2, "zero3": 2, "zero3_offload": 2, "zero2_tensor": 4}
# Forwards per step: 12 sequences do not divide by 4 data-parallel ranks times 2.
FORWARDS = {"hsdp": 1}
# row -> layout, number of processes. On three ranks no matrix divides evenly.
ODD = {"fsdp on 3": ("fsdp", 3), "zero3 on 3": ("zero3", 3)}
# These kinds are written and read on every change. As many torch kinds read a DeepSpeed kind's checkpoint as there are
# DeepSpeed kinds.
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
    """Run folders with a checkpoint of step 2, made on first use, and the uninterrupted run of a single process."""

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
        """Returns the journal of the resumed steps for each layout of a checkpoint."""
        folders = {source: self.of(source) for source in sources}
        journals = run_ranks(
            processes, resume_each, self.words(layout), [*folders.values()], STEPS - SAVED, timeout=280
        )[0]
        return dict(zip(folders, journals, strict=True))


@composes
def train_until_saved(words: Overrides, folder: str) -> Journal:
    return train_and_save(words, folder, upto=SAVED)


def some_or_all(layouts: Iterable[str], often: Sequence[str]) -> list[Any]:
    """Returns the rows (layout, whether it resumes from all others).

    Rows that resume from all others are nightly, and so are layouts outside `often`.
    """
    return rows(product(layouts, (False, True)), lambda layout, every: not every and layout in often)


def neighbour(layout: str, layouts: Sequence[str], away: int = 1) -> str:
    """Returns the entry of `layouts` that comes `away` places after `layout`.

    A layout outside `layouts` has its place in its own list.
    """
    own = next(each for each in (layouts, KINDS, KINDS_OF_ZERO, [*TORCH, *ZERO]) if layout in each)
    return layouts[(own.index(layout) + away) % len(layouts)]


def apart(found: Journal, expected: Journal) -> float:
    assert list(found.losses) == list(range(SAVED + 1, STEPS + 1))
    pairs = [(found.losses[step], expected.losses[step]) for step in found.losses]
    pairs += [(found.grad_norms[step], expected.grad_norms[step]) for step in found.losses]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def furthest(journals: dict[str, Journal], whole: Journal) -> float:
    """Returns the largest relative difference of the next losses and gradient norms."""
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


# 8-bit states have codes in blocks, which sharding splits. `ROLES` has states of several optimizers. `ADAPTERS` has
# adapters only.
STATES_OFTEN = (EIGHT_BITS, ROLES, ADAPTERS)


@pytest.mark.parametrize(
    ("words", "precision", "limit", "others"),
    rows(OTHER_STATES, lambda words, _precision, _limit, others: words in STATES_OFTEN and len(others) == 1),
)
def test_other_states_go_on_exactly(
    words: str, precision: str, limit: float, others: list[str], tmp_path: Path
) -> None:
    """Each layout resumes from its own checkpoint and from the next layout's, on more processes and on fewer.

    The states are Adafactor's rows, columns and vectors; codes and scales of 8-bit AdamW; NAdam's scalars; Muon's
    momentum next to other optimizers by role; adapters only.
    """
    saved = Saved(precision, tmp_path, *words.split())
    layouts = ["single", *others]
    for layout, after in zip(layouts, [*others, "single"], strict=True):
        found = saved.go_on(layout, {**TORCH, **ZERO}[layout], [layout, after])
        assert furthest(found, saved.whole) <= limit
        if layout == "single":
            lines = found[layout].lines
            assert all(lines[step] == saved.whole.lines[step] for step in lines), "not the same bits"
