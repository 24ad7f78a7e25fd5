"""The data of a run are the same under every layout, complete and resumable. All ranks refuse bad data alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.errors import DataError, PlanError
from tests.support.data_cases import Row, data_of, rows_of, rows_of_all_ranks, step_rows, words, write_corpus
from trainer.data import IGNORED


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


SYNTHETIC = ["data=synthetic", "data.ignore_fraction=0.5"]
SOURCES = pytest.mark.parametrize("source", ["files", "synthetic"])


def overrides_of(source: str, files: list[str]) -> list[str]:
    return files if source == "files" else SYNTHETIC


# One epoch


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_every_token_is_a_label_once_per_epoch(files: list[str], shuffle: str) -> None:
    text = [token for i in range(100) for token in (*words(i).encode(), 256)]
    samples = -(-(len(text) - 1) // 16)
    data = data_of(*files, f"data.shuffle={shuffle}", "train.micro_batch_size=1")
    steps = step_rows(data, steps=2 * samples)
    first, second = ([row for step in half for row in step] for half in (steps[:samples], steps[samples:]))
    for epoch in (first, second):
        labels = Counter(label for row in epoch for label in row[16:])
        padding = 16 * samples - (len(text) - 1)
        assert labels.pop(IGNORED) == padding > 0
        assert labels == Counter(text[1:])
        inputs = Counter(
            token for row in epoch for token, label in zip(row[:16], row[16:], strict=True) if label != IGNORED
        )
        assert inputs == Counter(text[:-1])
    assert sorted(first) == sorted(second)
    assert (first == second) is (shuffle == "false")
    if shuffle == "false":
        assert [token for row in first for token in row[:16]][: len(text) - 1] == text[:-1]


@SOURCES
def test_labels_are_the_inputs_one_further(files: list[str], source: str) -> None:
    for step in step_rows(data_of(*overrides_of(source, files)), steps=40):
        for row in step:
            assert all(label in (following, IGNORED) for following, label in zip(row[1:16], row[16:31], strict=True))


# Layouts, resume, loader processes


@SOURCES
def test_a_step_is_the_same_under_every_layout(files: list[str], source: str) -> None:
    overrides = overrides_of(source, files)
    reference = rows_of_all_ranks([*overrides, "train.gradient_accumulation_steps=4"], ranks=1, steps=40)
    for ranks, accumulation, micro in ((1, 1, 8), (2, 2, 2), (4, 1, 2), (4, 2, 1), (2, 1, 4)):
        layout = [f"train.gradient_accumulation_steps={accumulation}", f"train.micro_batch_size={micro}"]
        assert rows_of_all_ranks([*overrides, *layout], ranks=ranks, steps=40) == reference
    assert len({row for step in reference for row in step}) > 150


@SOURCES
def test_resume_goes_on_where_the_run_was(files: list[str], source: str) -> None:
    overrides = overrides_of(source, files)
    data = data_of(*overrides)
    steps = step_rows(data, steps=300)
    assert step_rows(data, steps=10, first_step=290) == steps[290:]
    # The same holds under another layout, because only positions count.
    resumed = rows_of_all_ranks([*overrides, "train.micro_batch_size=1"], ranks=2, steps=10, first_step=290)
    assert resumed == [sorted(step) for step in steps[290:]]


@SOURCES
def test_loader_processes_change_nothing(files: list[str], source: str) -> None:
    overrides = [*overrides_of(source, files), "train.gradient_accumulation_steps=3"]
    here, elsewhere = (step_rows(data_of(*overrides, f"data.num_workers={n}"), steps=30) for n in (0, 2))
    assert here == elsewhere


def test_seed_changes_the_order(files: list[str]) -> None:
    for overrides in (files, SYNTHETIC):
        one, other = (step_rows(data_of(*overrides, f"train.seed={seed}"), steps=5) for seed in (0, 1))
        assert one != other


@pytest.mark.parametrize("workers", [0, 2])
def test_the_models_random_numbers_are_left_alone(files: list[str], workers: int) -> None:
    data = data_of(*files, f"data.num_workers={workers}")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(data.steps())
    list(data.validation())
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_int64_and_contiguous(files: list[str]) -> None:
    for batch in next(data_of(*files).steps()):
        for tensor in (batch.input_ids, batch.labels):
            assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 16), torch.int64, True)


# Validation


@SOURCES
@pytest.mark.parametrize("samples", [1, 7, 16])
def test_validation_is_the_same_under_every_layout(files: list[str], source: str, samples: int) -> None:
    def rows(ranks: int, micro: int) -> list[Row]:
        overrides = [*overrides_of(source, files), f"train.eval_samples={samples}", f"train.micro_batch_size={micro}"]
        per_rank = [list(data_of(*overrides, ranks=ranks, data_rank=r).validation()) for r in range(ranks)]
        assert len({len(batches) for batches in per_rank}) == 1
        assert all(batch.input_ids.shape == (micro, 16) for batches in per_rank for batch in batches)
        everything = [row for batches in per_rank for batch in batches for row in rows_of(batch)]
        return sorted(row for row in everything if set(row[16:]) != {IGNORED})

    reference = rows(1, 2)
    assert len(reference) == samples
    assert rows(1, 8) == rows(2, 2) == rows(4, 1) == rows(4, 8) == reference


def test_validation_text_does_not_depend_on_the_seed(files: list[str]) -> None:
    one, other = (
        [rows_of(batch) for batch in data_of(*files, f"train.seed={seed}", "train.eval_samples=5").validation()]
        for seed in (0, 1)
    )
    assert one == other


def test_small_validation_sets_are_used_up_and_no_more(files: list[str]) -> None:
    text = [token for i in range(1000, 1010) for token in (*words(i).encode(), 256)]
    labels = Counter(
        label
        for batch in data_of(*files, "train.eval_samples=10000").validation()
        for row in rows_of(batch)
        for label in row[16:]
    )
    del labels[IGNORED]
    assert labels == Counter(text[1:])


def test_no_validation(files: list[str]) -> None:
    assert list(data_of(*files, "train.eval_samples=0").validation()) == []


# Synthetic samples


def test_synthetic_samples_fill_the_vocabulary_unevenly() -> None:
    rows = [row for step in step_rows(data_of("data=synthetic", vocab_size=50), steps=400) for row in step]
    counts = Counter(token for row in rows for token in row[:16])
    assert set(counts) == set(range(50))
    assert counts[0] > 10 * counts[49]


def test_synthetic_labels_are_ignored_raggedly() -> None:
    rows = [row for step in step_rows(data_of(*SYNTHETIC), steps=100) for row in step]
    ignored = [[label == IGNORED for label in row[16:]] for row in rows]
    assert all(mask == sorted(mask, reverse=True) for mask in ignored)
    assert {sum(mask) for mask in ignored} == set(range(9))


def test_synthetic_samples_never_change() -> None:
    """The numbers are recorded, so benchmarks and parity runs of different versions see the same tokens."""
    first = step_rows(data_of("data=synthetic", vocab_size=100), steps=1)[0][0]
    assert first[:16] == (73, 22, 29, 0, 57, 0, 19, 57, 0, 45, 23, 12, 57, 15, 48, 6)


# Data that all ranks refuse alike


def refused(*overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        data_of(*overrides)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_text_that_is_too_little(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("0123456789")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.jsonl").write_text('{"text": "' + "0123456789" * 10 + '"}')
    cache = f"data.cache_dir={tmp_path}/cache"

    def files(name: str, *overrides: str) -> tuple[str, ...]:
        return "data=files", f"data.paths=[{tmp_path}/{name}]", cache, *overrides

    where = f"data.paths=['{tmp_path}/{{}}']: "
    short = where.format("short.txt") + "11 tokens to train on do not fill one sample of data.seq_len=16 + 1; give more"
    assert refused(*files("short.txt")).startswith(short)
    assert refused(*files("short.txt")).endswith("data.seq_len=10 or less")
    assert data_of(*files("short.txt", "data.seq_len=10", "train.eval_samples=0")).describe().startswith("files: ")
    assert refused(*files("empty.txt")).startswith(where.format("empty.txt") + "every file is empty")
    assert refused(*files("one.jsonl")).startswith(where.format("one.jsonl") + "no text is left for validation")
    assert refused(*files("one.jsonl", "data.validation_fraction=0")).endswith("or set train.eval_samples=0")
    both = refused(*files("one.jsonl", f"data.validation_paths=[{tmp_path}]"))
    assert "names no file that data.validation_paths does not" in both


@pytest.mark.parametrize(
    ("override", "source"),
    [
        ("data.paths=[a.txt]", "files"),
        ("data.validation_paths=[a.txt]", "files"),
        ("data.name=a", "hub"),
        ("data.subset=a", "hub"),
        ("data.validation_split=a", "hub"),
        ("data.split=a", "hub"),
        ("data.revision=a", "hub"),
        ("data.shuffle_buffer=5", "hub"),
        ("data.text_key=a", "files"),
    ],
)
def test_keys_of_another_source_are_refused(override: str, source: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        PlanError, match=rf"^{key}=.*: is for data={source}\b.*, this is data=builtin; choose data={source}"
    ):
        data_of(override)


def test_builtin_needs_nothing(tmp_path: Path) -> None:
    data = data_of(f"data.cache_dir={tmp_path}", "train.eval_samples=4")
    assert data.describe().startswith("builtin: the source text of Python 3")
    assert "tokenizer bytes (257 tokens)" in data.describe()
    (batch,) = next(data.steps())
    assert batch.valid_tokens() == 32
    assert sum(batch.valid_tokens() for batch in data.validation()) == 64
