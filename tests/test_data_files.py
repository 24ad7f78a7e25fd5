"""Files become documents and cached tokens: which files are read or refused, and which work is not repeated."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.load import load_config
from tests.support.data_cases import corpus_of, documents_of, words
from trainer.data.cache import load_tokens
from trainer.data.documents import PIECE_BYTES, builtin_files, read_pieces
from trainer.data.paths import find_files
from trainer.data.tokenizer import Encoder, build_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(load_config(), vocab_size=None)


# Which files are read


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
    (tmp_path / "table.xml").write_text("a,b")
    absent, pattern = tmp_path / "absent.txt", tmp_path / "*.md"
    entries = [absent, pattern, tmp_path / "empty", tmp_path / "table.xml", tmp_path]
    entries.append(tmp_path / ("x" * 300))
    with pytest.raises(DataError) as caught:
        find_files(map(str, entries), key="data.validation_paths")
    rules = [
        "no such file or folder",
        "no such file or folder",
        "holds no files",
        "is a .xml",
        "holds only 1 x .xml",
        "cannot be looked up (File name too long); name another",
    ]
    for entry, rule, problem in zip(entries, rules, caught.value.problems, strict=True):
        assert problem.startswith(f"data.validation_paths={entry}: ")
        assert rule in problem
        assert problem.endswith(("(.gz or .zst may follow those of rows)", "name another"))


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
    assert documents_of(text) == (["one\ntwo\n", "# Three", "four\nfive", "six é", "seven", "eight"], [])
    assert (text.counts.documents, text.counts.skipped) == (6, 0)


def test_empty_texts_are_passed_over_and_counted(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "b"}\n')
    pq.write_table(pa.table({"text": ["c", None, ""]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text("")
    files = find_files([str(tmp_path)], key="data.paths")
    text = load_tokens(corpus_of(*files, fraction=0), encoder, cache_dir=str(tmp_path / "cache"))
    assert documents_of(text) == (["b", "c"], [])
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
    with pytest.raises(
        DataError, match=r"data\.text_key=t: .*a\.parquet, row 1 has no such field; it has 'body', 'text'"
    ):
        list(read_pieces(tmp_path / "a.parquet", text_key="t"))
    with pytest.raises(DataError, match=r"data\.text_key=text: .*a\.parquet, row 1 holds int there, not text"):
        list(read_pieces(tmp_path / "a.parquet", text_key="text"))


def test_damage_within_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [words(i) for i in range(500)]}), tmp_path / "a.parquet", compression="zstd")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[100:400] = bytes(300)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.paths: .*a\.parquet"):
        list(read_pieces(tmp_path / "a.parquet", text_key="text"))
