"""Files are tokenised once: which text is held out, and when tokens are reused or made again."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.load import load_config
from tests.support.data_cases import corpus_of, documents_in, documents_of, words, write_jsonl
from tests.support.harness import run_ranks
from tests.test_data_tokenizer import save_bpe
from trainer.data.cache import Corpus, load_tokens
from trainer.data.documents import PIECE_BYTES
from trainer.data.tokenizer import Encoder, build_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(load_config(), vocab_size=None)


# Held out


def test_held_out_text_is_chosen_by_its_content(tmp_path: Path, encoder: Encoder) -> None:
    texts = [words(i) for i in range(400)]
    first = write_jsonl(tmp_path / "first.jsonl", texts)
    # The same texts in reverse order, each twice, with other texts between them.
    second = write_jsonl(
        tmp_path / "second.jsonl", [t for i, x in enumerate(texts[::-1]) for t in (x, words(1000 + i), x)]
    )
    training, validation = documents_of(load_tokens(corpus_of(first), encoder, cache_dir=str(tmp_path / "cache")))
    assert sorted(training + validation) == sorted(texts)
    assert 40 < len(validation) < 120
    again, again_validation = documents_of(load_tokens(corpus_of(second), encoder, cache_dir=str(tmp_path / "cache")))
    assert set(validation) == set(again_validation) & set(texts)
    assert not set(again) & set(again_validation)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_side_is_left_empty(tmp_path: Path, encoder: Encoder, fraction: float) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", map(words, range(5)))
    text = load_tokens(corpus_of(file, fraction=fraction), encoder, cache_dir=str(tmp_path / "cache"))
    sizes = tuple(map(len, documents_of(text)))
    assert sizes == ((4, 1) if fraction < 0.5 else (1, 4))


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_a_single_document_is_trained_on(tmp_path: Path, encoder: Encoder, fraction: float) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [words(1)])
    text = load_tokens(corpus_of(file, fraction=fraction), encoder, cache_dir=str(tmp_path / "cache"))
    assert documents_of(text) == ([words(1)], [])


def test_one_big_file_is_divided_at_lines(tmp_path: Path, encoder: Encoder) -> None:
    lines = [words(i) + "\n" for i in range(12_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    text = load_tokens(corpus_of(tmp_path / "book.txt"), encoder, cache_dir=str(tmp_path / "cache"))
    training, validation = documents_of(text)
    assert text.counts.documents == 1
    assert sorted("".join(training + validation).splitlines(keepends=True)) == sorted(lines)
    assert 0.05 < text.validation.count / text.training.count < 0.6
    # EOS comes only where the text continues on the other side of the split, so runs of pieces stay together.
    assert abs(len(training) - len(validation)) <= 1
    assert max(map(len, training)) > 2 * PIECE_BYTES


def test_validation_files_are_for_validation_alone(tmp_path: Path, encoder: Encoder) -> None:
    training, validation = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), write_jsonl(tmp_path / "b.jsonl", ["c"])
    corpus = corpus_of(training, validation=(validation,), fraction=0.9)
    assert documents_of(load_tokens(corpus, encoder, cache_dir=str(tmp_path / "cache"))) == (["a", "b"], ["c"])


# The cache


def entries(cache: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_ino for path in cache.glob("*/meta.json")}


def test_tokens_are_reused_until_something_changes(tmp_path: Path, encoder: Encoder) -> None:
    cache, file = tmp_path / "cache", write_jsonl(tmp_path / "a.jsonl", map(words, range(50)))

    def load(corpus: Corpus) -> int:
        load_tokens(corpus, encoder, cache_dir=str(cache))
        return len(entries(cache))

    assert load(corpus_of(file)) == 1
    before = entries(cache)
    assert load(corpus_of(file)) == 1
    assert entries(cache) == before
    changes: list[Callable[[], Corpus]] = [
        lambda: corpus_of(file, fraction=0.3),
        lambda: corpus_of(file, validation=(file,)),
        lambda: corpus_of(file, file),
        lambda: corpus_of(write_jsonl(file, map(words, range(51)))),
        # The size is the same, but the modification time differs.
        lambda: os.utime(file, ns=(1, 1)) or corpus_of(file),
        lambda: corpus_of(write_jsonl(file, map(words, range(51)), key="body"), key="body"),
    ]
    for number, change in enumerate(changes, start=2):
        assert load(change()) == number


def test_another_tokenizer_has_tokens_of_its_own(tmp_path: Path, encoder: Encoder) -> None:
    save_bpe(tmp_path / "bpe", eos_token="</s>")
    other = build_encoder(load_config([f"data.tokenizer={tmp_path / 'bpe'}", "data.bos=never"]), vocab_size=None)
    file = write_jsonl(tmp_path / "a.jsonl", map(words, range(50)))
    text, others = (load_tokens(corpus_of(file), e, cache_dir=str(tmp_path / "cache")) for e in (encoder, other))
    assert text.training.path != others.training.path
    decoded = documents_in(others.training.array().tolist(), end=other.end, decode=other.tokenizer.decode)
    assert list(decoded) == documents_of(text)[0]


def test_large_vocabularies_need_four_bytes(tmp_path: Path, encoder: Encoder) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["abc", "def"])
    wide = replace(encoder, vocabulary=2**17, end=2**17 - 1, fingerprint="wide")
    text = load_tokens(corpus_of(file, fraction=0), wide, cache_dir=str(tmp_path / "cache"))
    assert text.training.array().tolist() == [97, 98, 99, 131071, 100, 101, 102, 131071]


def build_and_count(folder: str) -> tuple[int, list[int]]:
    """Tokenises in this process if necessary. Returns the number of tokenisations and the tokens."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("trainer.data.cache").addHandler(handler)
    logging.getLogger("trainer.data.cache").setLevel(logging.INFO)
    corpus = corpus_of(Path(folder) / "a.jsonl")
    text = load_tokens(corpus, build_encoder(load_config(), vocab_size=None), cache_dir=f"{folder}/cache")
    return sum(line.startswith("tokenising") for line in said), text.training.array().tolist()


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", map(words, range(50_000)))
    (built, tokens), (other_built, other_tokens) = run_ranks(2, build_and_count, str(tmp_path))
    assert built + other_built == 1
    assert tokens == other_tokens
    assert len(entries(tmp_path / "cache")) == 1


def test_what_a_killed_builder_left_is_not_used(tmp_path: Path, encoder: Encoder) -> None:
    cache, corpus = tmp_path / "cache", corpus_of(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), fraction=0)
    left = cache / f"{corpus.key(encoder)}.{socket.gethostname()}.partial"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"half")
    (cache / f"{corpus.key(encoder)}.lock").touch()
    text = load_tokens(corpus, encoder, cache_dir=str(cache))
    assert documents_of(text) == (["a", "b"], [])
    assert not left.exists()


def test_damaged_entries_are_named(tmp_path: Path, encoder: Encoder) -> None:
    corpus = corpus_of(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), fraction=0)
    text = load_tokens(corpus, encoder, cache_dir=str(tmp_path / "cache"))
    folder = Path(text.training.path).parent
    meta = (folder / "meta.json").read_text()
    damage: list[tuple[Callable[[], object], str]] = [
        (lambda: os.truncate(text.training.path, 3), r"train\.bin holds 3 bytes, not 8"),
        (lambda: os.remove(text.training.path), r"train\.bin holds 0 bytes, not 8"),
        (lambda: os.truncate(folder / "meta.json", 3), r"meta\.json: Unterminated string"),
        (lambda: (folder / "meta.json").write_text("[]"), r"meta\.json: .*must be a mapping"),
        (lambda: (folder / "meta.json").write_text(meta.replace("uint16", "str17x")), r"meta\.json: "),
    ]
    for damaging, found in damage:
        damaging()
        message = (
            rf"data\.cache_dir={tmp_path}/cache: the entry {folder.name} is damaged \({found}.*\); delete {folder}"
        )
        with pytest.raises(DataError, match=message):
            load_tokens(corpus, encoder, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_cache_that_cannot_be_written(tmp_path: Path, encoder: Encoder, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    corpus = corpus_of(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]))
    with pytest.raises(
        DataError, match=r"data\.cache_dir=.*: cannot keep the tokenised text there \(.*; choose a folder"
    ):
        load_tokens(corpus, encoder, cache_dir=str(tmp_path / place))


def test_meta_file_is_readable_by_people(tmp_path: Path, encoder: Encoder) -> None:
    text = load_tokens(
        corpus_of(write_jsonl(tmp_path / "a.jsonl", ["abc"]), fraction=0), encoder, cache_dir=str(tmp_path)
    )
    meta = json.loads((Path(text.training.path).parent / "meta.json").read_text())
    assert (meta["documents"], meta["training_tokens"], meta["validation_tokens"]) == (1, 4, 0)
