"""Files to documents to cached tokens: what is read, what is refused, and what is not done twice."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.load import load_config
from tests.data_cases import documents_in, words, write_jsonl
from tests.harness import run_ranks
from tests.test_data_tokenizer import save_bpe
from trainer.data.cache import Corpus, TokenisedText, load_tokens
from trainer.data.documents import PIECE_BYTES, builtin_files, find_files, read_pieces
from trainer.data.tokenizer import Encoder, build_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(load_config(), vocab_size=None)


def corpus_of(*training: Path, validation: tuple[Path, ...] = (), key: str = "text", fraction: float = 0.2) -> Corpus:
    return Corpus(training=training, validation=validation, text_key=key, fraction=fraction)


def documents(text: TokenisedText) -> tuple[list[str], list[str]]:
    """Training and validation documents, in order."""
    return list(documents_in(text.training.array().tolist())), list(documents_in(text.validation.array().tolist()))


# Which files


def test_folders_patterns_and_files_each_once(tmp_path: Path) -> None:
    names = ["a.txt", "b.MD", "sub/c.jsonl", "sub/deep/d.parquet", "e.csv", ".hidden.txt", ".git/f.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    expected = [(tmp_path / name).resolve() for name in ["a.txt", "b.MD", "sub/c.jsonl", "sub/deep/d.parquet"]]
    found = find_files([str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path / "*" / "*.jsonl")], key="data.paths")
    assert found == expected
    assert find_files([str(tmp_path / "sub*")], key="data.paths") == expected[2:]
    assert find_files([str(tmp_path / "**" / "*.parquet")], key="data.paths") == expected[3:]
    assert find_files([str(tmp_path / ".hidden.txt")], key="data.paths") == [(tmp_path / ".hidden.txt").resolve()]


def test_every_path_that_yields_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    absent, pattern = tmp_path / "absent.txt", tmp_path / "*.md"
    entries = [absent, pattern, tmp_path / "empty", tmp_path / "table.csv", tmp_path]
    with pytest.raises(DataError) as caught:
        find_files(map(str, entries), key="data.validation_paths")
    rules = ["no such file or folder", "no such file or folder", "holds no files", "is a .csv", "holds only 1 x .csv"]
    for entry, rule, problem in zip(entries, rules, caught.value.problems, strict=True):
        assert problem.startswith(f"data.validation_paths={entry}: ")
        assert rule in problem
        assert problem.endswith("supported are .txt, .md, .jsonl, .parquet")


def test_builtin_text_is_the_running_pythons_library() -> None:
    files = builtin_files()
    assert files == builtin_files()
    assert {"os.py", "argparse.py"} <= {path.name for path in files}
    assert not any({"test", "site-packages", "idlelib", "encodings"} & set(path.parts) for path in files)
    assert 4 * 2**20 < sum(path.stat().st_size for path in files) <= 8 * 2**20


# From files to documents


@pytest.mark.parametrize("line", ["short line é\n", "中" * 100 + "\n", "😀" * 20_000, ""])
def test_pieces_of_a_text_are_the_whole_text(tmp_path: Path, line: str) -> None:
    text = (line * (200_000 // (len(line.encode()) or 1)) if line else "") + "end"
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_pieces(tmp_path / "a.txt", text_key="text"))
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text.encode()) <= 2 * PIECE_BYTES + 3 for piece in pieces)
    if "\n" in text:
        assert all(piece.text.endswith("\n") for piece in pieces[:-1])


def test_documents_of_all_kinds_of_files(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.md").write_text("# Three")
    (tmp_path / "c.jsonl").write_text('{"id": 1, "body": "four\\nfive"}\n\n{"body": "six \\u00e9"}')
    pq.write_table(pa.table({"id": [1, 2], "body": ["seven", "eight"]}), tmp_path / "d.parquet", row_group_size=1)
    files = find_files([str(tmp_path)], key="data.paths")
    text = load_tokens(corpus_of(*files, key="body", fraction=0), encoder, cache_dir=str(tmp_path / "cache"))
    assert documents(text) == (["one\ntwo\n", "# Three", "four\nfive", "six é", "seven", "eight"], [])
    assert (text.counts.documents, text.counts.skipped) == (6, 0)


def test_empty_texts_are_passed_over_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["c", None, ""]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text("")
    files = find_files([str(tmp_path)], key="data.paths")
    text = load_tokens(corpus_of(*files, fraction=0), encoder, cache_dir=str(tmp_path / "cache"))
    assert documents(text) == (["b", "c"], [])
    assert (text.counts.documents, text.counts.skipped) == (2, 5)


def test_parquet_columns_of_categories_are_text(tmp_path: Path) -> None:
    column = pa.array(["x", "y", "x"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [piece.text for piece in read_pieces(tmp_path / "a.parquet", text_key="text")] == ["x", "y", "x"]


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.txt", b"text\0more", r"a\.txt is not UTF-8 text \(NUL at byte 4\); convert it"),
    ("a.txt", b"x" * 70_000 + b"\xff\n", r"\(0xff at byte 70000\)"),
    ("a.txt", "é".encode() * 40_000 + b"\xc3", r"\(0xc3 at byte 80000\)"),
    ("a.md", b"x" * (2 * PIECE_BYTES - 1) + b"\xc3\x28", rf"\(0xc3 at byte {2 * PIECE_BYTES - 1}\)"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON \("),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: not a JSON object but list"),
    ("a.jsonl", b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"a\.jsonl:3 has no such field; it has 'body', 'id'"),
    ("a.jsonl", b'{"text": 5}\n', r"data\.text_key=text: .*a\.jsonl:1 holds int there, not text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"\(0xff at byte 24, line 2\)"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:1 holds half a character \(\\ud83d\)"),
    ("a.jsonl", b"\x1f\x8b\x08\x00", r"is not UTF-8 text \(0x8b at byte 1, line 1\)"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON \("),
    ("a.parquet", b"PAR1 nothing PAR1", r"a\.parquet is not a sound parquet file \("),
    ("a.parquet", b"x", r"a\.parquet is not a sound parquet file \("),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_files_that_are_refused(tmp_path: Path, encoder: Encoder, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=message) as caught:
        load_tokens(corpus_of(tmp_path / name), encoder, cache_dir=str(cache))
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_parquet_columns_that_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"data\.text_key=t: .*a\.parquet has no such column; it has 'body', 'text'"):
        list(read_pieces(tmp_path / "a.parquet", text_key="t"))
    with pytest.raises(DataError, match=r"data\.text_key=text: .*a\.parquet holds int there, not text"):
        list(read_pieces(tmp_path / "a.parquet", text_key="text"))


def test_damage_within_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [words(i) for i in range(500)]}), tmp_path / "a.parquet", compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[100:400] = bytes(300)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.paths: .*a\.parquet"):
        list(read_pieces(tmp_path / "a.parquet", text_key="text"))


# Held out


def test_held_out_text_is_chosen_by_its_content(tmp_path: Path, encoder: Encoder) -> None:
    texts = [words(i) for i in range(400)]
    first = write_jsonl(tmp_path / "first.jsonl", texts)
    # The same texts backwards, each twice, and others between them.
    second = write_jsonl(
        tmp_path / "second.jsonl", [t for i, x in enumerate(texts[::-1]) for t in (x, words(1000 + i), x)]
    )
    training, validation = documents(load_tokens(corpus_of(first), encoder, cache_dir=str(tmp_path / "cache")))
    assert sorted(training + validation) == sorted(texts)
    assert 40 < len(validation) < 120
    again, again_validation = documents(load_tokens(corpus_of(second), encoder, cache_dir=str(tmp_path / "cache")))
    assert set(validation) == set(again_validation) & set(texts)
    assert not set(again) & set(again_validation)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_neither_side_is_left_empty(tmp_path: Path, encoder: Encoder, fraction: float) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", map(words, range(5)))
    text = load_tokens(corpus_of(file, fraction=fraction), encoder, cache_dir=str(tmp_path / "cache"))
    sizes = tuple(map(len, documents(text)))
    assert sizes == ((4, 1) if fraction < 0.5 else (1, 4))


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_a_single_document_is_trained_on(tmp_path: Path, encoder: Encoder, fraction: float) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [words(1)])
    text = load_tokens(corpus_of(file, fraction=fraction), encoder, cache_dir=str(tmp_path / "cache"))
    assert documents(text) == ([words(1)], [])


def test_one_big_file_is_divided_at_lines(tmp_path: Path, encoder: Encoder) -> None:
    lines = [words(i) + "\n" for i in range(12_000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    text = load_tokens(corpus_of(tmp_path / "book.txt"), encoder, cache_dir=str(tmp_path / "cache"))
    training, validation = documents(text)
    assert text.counts.documents == 1
    assert sorted("".join(training + validation).splitlines(keepends=True)) == sorted(lines)
    assert 0.05 < text.validation.count / text.training.count < 0.6
    # EOS stands only where the text goes on on the other side: runs of pieces stay together.
    assert abs(len(training) - len(validation)) <= 1
    assert max(map(len, training)) > 2 * PIECE_BYTES


def test_validation_files_are_for_validation_alone(tmp_path: Path, encoder: Encoder) -> None:
    training, validation = write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), write_jsonl(tmp_path / "b.jsonl", ["c"])
    corpus = corpus_of(training, validation=(validation,), fraction=0.9)
    assert documents(load_tokens(corpus, encoder, cache_dir=str(tmp_path / "cache"))) == (["a", "b"], ["c"])


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
        # The same size, another time of modification.
        lambda: os.utime(file, ns=(1, 1)) or corpus_of(file),
        lambda: corpus_of(write_jsonl(file, map(words, range(51)), key="body"), key="body"),
    ]
    for number, change in enumerate(changes, start=2):
        assert load(change()) == number


def test_another_tokenizer_has_tokens_of_its_own(tmp_path: Path, encoder: Encoder) -> None:
    save_bpe(tmp_path / "bpe", eos_token="</s>")
    other = build_encoder(load_config([f"data.tokenizer={tmp_path / 'bpe'}"]), vocab_size=None)
    file = write_jsonl(tmp_path / "a.jsonl", map(words, range(50)))
    text, others = (load_tokens(corpus_of(file), e, cache_dir=str(tmp_path / "cache")) for e in (encoder, other))
    assert text.training.path != others.training.path
    decoded = documents_in(others.training.array().tolist(), end=other.end, decode=other.tokenizer.decode)
    assert list(decoded) == documents(text)[0]


def test_large_vocabularies_need_four_bytes(tmp_path: Path, encoder: Encoder) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["abc", "def"])
    wide = replace(encoder, vocabulary=2**17, end=2**17 - 1, fingerprint="wide")
    text = load_tokens(corpus_of(file, fraction=0), wide, cache_dir=str(tmp_path / "cache"))
    assert text.training.array().tolist() == [97, 98, 99, 131071, 100, 101, 102, 131071]


def build_and_count(folder: str) -> tuple[int, list[int]]:
    """Tokenise in this process. Returns how often it had to, and the tokens."""
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
    assert documents(text) == (["a", "b"], [])
    assert not left.exists()


def test_damaged_entries_are_named(tmp_path: Path, encoder: Encoder) -> None:
    corpus = corpus_of(write_jsonl(tmp_path / "a.jsonl", ["a", "b"]), fraction=0)
    text = load_tokens(corpus, encoder, cache_dir=str(tmp_path / "cache"))
    os.truncate(text.training.path, 3)
    with pytest.raises(DataError, match=r"data\.cache_dir: .*train\.bin is damaged, it should hold 8 bytes; delete "):
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
