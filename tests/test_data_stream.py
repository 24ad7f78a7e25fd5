"""The stream of `data=hub`, here from a local folder, is the same under every layout and loses nothing."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import trainer.data.stream
from configs.errors import DataError, RankProblem
from configs.load import load_config
from tests.support.data_cases import (
    Row,
    data_of,
    documents_in,
    rows_of,
    rows_of_all_ranks,
    step_rows,
    words,
    write_jsonl,
)
from trainer.data import IGNORED
from trainer.data.stream import TextStream, hold_out, open_stream
from trainer.data.tokenizer import build_encoder

TEXTS = [words(i) for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with two splits, which `datasets` finds by their file names."""
    folder = tmp_path_factory.mktemp("data_set")
    write_jsonl(folder / "train.jsonl", TEXTS)
    write_jsonl(folder / "test.jsonl", [words(i) for i in range(1000, 1005)])
    return folder


def hub(folder: Path, *overrides: str) -> list[str]:
    return ["data=hub", f"data.name={folder}", "data.shuffle_buffer=20", *overrides]


def first_tokens(rows: list[list[Row]], seq_len: int = 16) -> list[int]:
    """Returns the sequence of tokens that one rank's windows were cut from."""
    inputs = [row[:seq_len] for step in rows for row in step]
    return [token for row in inputs for token in row]


def test_every_document_comes_once_per_epoch_in_a_new_order(folder: Path) -> None:
    data = data_of(*hub(folder, "train.eval_samples=0", "data.validation_fraction=0", "train.micro_batch_size=1"))
    length = sum(len(text.encode()) + 1 for text in TEXTS)
    tokens = first_tokens(step_rows(data, steps=3 * length // 16 + 1))
    epochs = [list(documents_in(tokens[number * length : (number + 1) * length])) for number in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [TEXTS, *epochs]}) == 4


def test_without_shuffle_documents_come_as_they_stand(folder: Path) -> None:
    data = data_of(*hub(folder, "train.eval_samples=0", "data.validation_fraction=0", "data.shuffle=false"))
    tokens = first_tokens(step_rows(data, steps=20))
    assert bytes(tokens[: len(TEXTS[0])]).decode() == TEXTS[0]


def test_a_step_is_the_same_under_every_layout(folder: Path) -> None:
    reference = rows_of_all_ranks(hub(folder, "train.gradient_accumulation_steps=4"), ranks=1, steps=12)
    for ranks, accumulation, micro in ((2, 2, 2), (4, 1, 2), (2, 1, 4)):
        layout = [f"train.gradient_accumulation_steps={accumulation}", f"train.micro_batch_size={micro}"]
        assert rows_of_all_ranks(hub(folder, *layout), ranks=ranks, steps=12) == reference
    assert len({row for step in reference for row in step}) > 90


def test_labels_are_the_inputs_one_further(folder: Path) -> None:
    for step in step_rows(data_of(*hub(folder)), steps=5):
        assert all(row[1:16] == row[16:31] for row in step)


def test_resume_goes_on_where_the_run_was(folder: Path) -> None:
    data = data_of(*hub(folder))
    steps = step_rows(data, steps=120)
    assert step_rows(data, steps=10, first_step=110) == steps[110:]
    assert step_rows(data, steps=1) == steps[:1]


def test_loader_processes_change_nothing(folder: Path) -> None:
    here, elsewhere = (step_rows(data_of(*hub(folder, f"data.num_workers={n}")), steps=100) for n in (0, 2))
    assert here == elsewhere


def test_held_out_documents_are_not_trained_on(folder: Path) -> None:
    overrides = hub(folder, "data.validation_fraction=0.2", "train.eval_samples=1000")
    config = load_config(overrides)
    stream = TextStream(rows=open_stream(config.data, split="train"), data=config.data, split="train")
    held = hold_out(stream, build_encoder(config, vocab_size=None), fraction=0.2, tokens=10**6)
    held_out = set(documents_in(held.tokens.tolist()))
    trained = bytes(t for t in first_tokens(step_rows(data_of(*overrides), steps=300)) if t < 256).decode()
    assert 3 < len(held_out) < 30
    assert {text for text in TEXTS if text in trained} == set(TEXTS) - held_out
    validated = [row for batch in data_of(*overrides).validation() for row in rows_of(batch) if row[-1] != IGNORED]
    assert len(validated) == (len(held.tokens) - 1) // 16


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_side_is_left_empty(folder: Path, fraction: float) -> None:
    data = data_of(*hub(folder, f"data.validation_fraction={fraction}", "train.eval_samples=1000"))
    assert sum(batch.valid_tokens() for batch in data.validation()) > 30
    assert step_rows(data, steps=1)


def test_a_split_of_its_own_for_validation(folder: Path) -> None:
    data = data_of(*hub(folder, "data.validation_split=test", "train.eval_samples=4"))
    rows = [row for batch in data.validation() for row in rows_of(batch)]
    text = (words(1000) + "\n" + words(1001)).encode().replace(b"\n", b"\0")
    expected = [256 if byte == 0 else byte for byte in text][: 4 * 16]
    assert sorted(row[:16] for row in rows) == sorted(tuple(expected[i : i + 16]) for i in range(0, 64, 16))
    trained = first_tokens(step_rows(data_of(*hub(folder, "data.validation_split=test")), steps=400))
    assert all(text.encode() in bytes(t for t in trained if t < 256) for text in TEXTS)


def test_validation_is_the_same_under_every_layout(folder: Path) -> None:
    def rows(ranks: int) -> list[Row]:
        overrides = hub(folder, "data.validation_split=test", "train.eval_samples=9")
        data = [data_of(*overrides, ranks=ranks, data_rank=rank) for rank in range(ranks)]
        batches = [list(one.validation()) for one in data]
        assert len({len(mine) for mine in batches}) == 1
        return sorted(row for mine in batches for batch in mine for row in rows_of(batch) if row[16] != IGNORED)

    assert len(rows(1)) == 9
    assert rows(1) == rows(2) == rows(4)


def test_description(folder: Path) -> None:
    text = data_of(*hub(folder, "data.validation_split=test")).describe()
    assert text.startswith(
        f"hub: {folder}, split train, streamed; the run reads 3,200 tokens; validation 414 tokens in 26"
    )
    assert text.endswith("samples from test; tokenizer bytes (257 tokens)")


def test_texts_are_shuffled_in_blocks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", (f"{number:03}" for number in range(100)))
    seeds = [
        data_of(*hub(tmp_path, f"train.seed={seed}", "train.eval_samples=0", "data.validation_fraction=0"))
        for seed in (1, 1, 2)
    ]
    first, same, other = ([*documents_in(first_tokens(step_rows(data, steps=25))[: 4 * 200])] for data in seeds)
    assert first == same != other
    numbers = [int(text) for text in first]
    assert all(
        sorted(numbers[start : start + 20]) == list(range(start % 100, start % 100 + 20)) for start in range(0, 200, 20)
    )
    assert numbers[:100] != numbers[100:]


@pytest.mark.parametrize(("shuffle", "workers"), [(True, 0), (False, 0), (True, 1)])
def test_resume_reads_only_what_is_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle: bool, workers: int
) -> None:
    """A resumed stream skips earlier rows, also on another number of ranks.

    It reads the current block, the texts to train on, and texts that wait for the shuffle or for the tokenizer, which
    gets 64 KiB at once.
    """
    for number in range(3):
        write_jsonl(tmp_path / f"train-{number}.jsonl", (words(1000 * number + i, 200) for i in range(100)))
    overrides = [*hub(tmp_path, f"data.shuffle={shuffle}"), "data.seq_len=128", f"data.num_workers={workers}"]
    data, rows, mark = data_of(*overrides, "train.gradient_accumulation_steps=2"), [], None
    for number, step in enumerate(islice(data.steps(), 540)):
        rows.append(sorted(row for batch in step for row in rows_of(batch)))
        mark = json.loads(json.dumps(data.mark())) if number == 519 else mark
    read = count_rows(monkeypatch)
    for ranks, accumulation in ((1, 2), (2, 1)):
        found: list[list[Row]] = [[] for _ in range(20)]
        for rank in range(ranks):
            layout = f"train.gradient_accumulation_steps={accumulation}"
            again = data_of(*overrides, layout, ranks=ranks, data_rank=rank)
            read.clear()
            for mine, step in zip(found, again.steps(520, mark), strict=False):
                mine += [row for batch in step for row in rows_of(batch)]
            trained = len({row for step in rows[520:] for row in step}) * 128 // 1100
            assert len(read) < 20 + trained + 20 + 2 * 2**16 // 1100, "of the 250 that come before"
        assert [sorted(step) for step in found] == rows[520:]


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that collects every text taken out of a row from now on."""
    read: list[str] = []
    original = trainer.data.stream.text_of

    def counted(*args: Any, **more: Any) -> str:
        read.append(original(*args, **more))
        return read[-1]

    monkeypatch.setattr(trainer.data.stream, "text_of", counted)
    return read


def test_files_of_a_data_set_are_shuffled_too(tmp_path: Path) -> None:
    for number in range(8):
        write_jsonl(tmp_path / f"train-{number}.jsonl", [words(number)])
    overrides = hub(tmp_path, "data.shuffle_buffer=1", "train.eval_samples=0", "data.validation_fraction=0")
    length = sum(len(words(number)) + 1 for number in range(8))
    tokens = first_tokens(step_rows(data_of(*overrides), steps=2 * length // 32 + 1))
    epochs = [list(documents_in(tokens[number * length : (number + 1) * length])) for number in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(words, range(8)))
    assert len({tuple(epoch) for epoch in [list(map(words, range(8))), *epochs]}) == 3


def refused(*overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        data_of(*overrides)
    (problem,) = caught.value.problems
    assert "\n" not in problem
    return problem


def test_data_sets_that_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_or = {"numbers": {"text": 1}, "nothing": {"text": ""}, "one": {"text": "only"}}
    for name, row in write_or.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    cases = [
        (hub(folder, "data.split=dev"), f"data.name={folder}: split dev cannot be opened (Bad split: dev"),
        (hub(folder, "data.validation_split=dev"), f"data.name={folder}: split dev cannot be opened (Bad split: dev"),
        (hub(folder, "data.subset=x"), f"data.name={folder}: split train of subset x cannot be opened (BuilderConfig"),
        (hub(folder, "data.revision=v1"), "data.revision=v1: data.name="),
        (
            hub(folder, "data.text_key=body"),
            f"data.text_key=body: data.name={folder}: split train, file 1 of 1, row 0 has no such field",
        ),
        (hub(tmp_path / "absent"), f"data.name={tmp_path / 'absent'}: split train cannot be opened ("),
        (hub(tmp_path / "empty"), f"data.name={tmp_path / 'empty'}: split train cannot be opened ("),
        (
            hub(tmp_path / "numbers"),
            f"data.text_key=text: data.name={tmp_path / 'numbers'}: split train, file 1 of 1, row 0 holds int there",
        ),
        (hub(tmp_path / "nothing"), f"data.name={tmp_path / 'nothing'}: split train holds no text in text"),
        (hub(tmp_path / "one"), f"data.name={tmp_path / 'one'}: split train gave no text for validation"),
    ]
    for overrides, message in cases:
        assert refused(*overrides).startswith(message)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_off_says_where(tmp_path: Path, workers: int) -> None:
    """The error is one line. If a loader process raised it, that process's traceback is left out."""
    write_jsonl(tmp_path / "train-0.jsonl", TEXTS)
    (tmp_path / "train-1.jsonl").write_text("{broken")
    overrides = hub(tmp_path, "data.shuffle=false", "train.eval_samples=0", f"data.num_workers={workers}")
    steps = data_of(*overrides).steps()
    with pytest.raises(
        RankProblem, match=rf"^data\.name={tmp_path}: split train, file 2 of 2, row 0 cannot be read \("
    ) as caught:
        list(islice(steps, 1000))
    assert "\n" not in str(caught.value)
