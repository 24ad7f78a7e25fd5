"""Conversations are read from the rows of files of every kind. Bad files and rows are refused."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from tests.support.data_cases import data_of
from tests.test_data_formats import ANSWER, QUESTION, TALK, read
from trainer.data.formats.common import Reading
from trainer.data.messages import read_conversations
from trainer.data.rows import read_rows


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _zst(path: Path, content: bytes) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)


def _csv(path: Path, rows: list[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: each if isinstance(each, str) else json.dumps(each) for key, each in row.items()} for row in rows
        )


WRITTEN: dict[str, Callable[[Path, list[Any]], object]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    "a.jsonl.zst": lambda path, rows: _zst(path, _lines(rows)),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "b.json": lambda path, rows: path.write_bytes(_lines(rows)),
    "a.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "a.csv": _csv,
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}
MANY = {
    "alpaca": [{"instruction": f'say "{n}"\n', "input": ",", "output": f"é {n}"} for n in range(3)],
    "messages": [{"messages": [QUESTION, {"role": "assistant", "content": f"{n}"}], "tools": "[]"} for n in range(3)],
}


@pytest.mark.parametrize("form", MANY)
@pytest.mark.parametrize("name", WRITTEN)
def test_files_of_every_kind(tmp_path: Path, name: str, form: str) -> None:
    rows = MANY[form]
    WRITTEN[name](tmp_path / name, rows)
    found = list(read_conversations(tmp_path / name, Reading()))
    answers = [row["output"] if form == "alpaca" else row["messages"][1]["content"] for row in rows]
    assert [each.messages[-1]["content"] for each in found] == answers
    assert {each.form for each in found} == {form}
    assert len({each.where for each in found}) == 3


def test_a_call_of_a_table_has_the_arguments_of_its_row(tmp_path: Path) -> None:
    """All rows of a table have the same columns, so a call has the other tool's argument too, as null."""
    calls = [{"name": "add", "arguments": {"a": 2}}, {"name": "find", "arguments": {"text": "x"}}]
    rows = [
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}]}
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_conversations(tmp_path / "a.parquet", Reading()))
    assert [each.messages for each in found] == [row["messages"] for row in rows]


BROKEN: list[tuple[str, bytes, str]] = [
    ("a.json", b'[{"a": 1},\n {"a": 2}\n {"a": 3}]', r"a\.json:3: not JSON \(neither a comma nor"),
    ("a.json", b'[{"a": 1},\n {"a": }]', r"a\.json:2, record 2: not JSON \("),
    ("a.json", b'[{"a": 1},\n\n', r"a\.json:3: not JSON \(the array has no end\)"),
    ("a.json", b'[{"a": 1}]\n{"a": 2}', r"a\.json:1: not JSON \(something follows the array\)"),
    ("a.json", b"[1]", r"a\.json:1, record 1: not a JSON object but int"),
    ("a.json", b'["\xff"]', r"a\.json is not UTF-8 text \(0xff at byte 2\)"),
    ("a.csv", b"a,b\n1,2\n\n1,2,3\n", r"a\.csv:4: 3 value\(s\) for 2 column\(s\)"),
    ("a.csv", b"a,a\n1,2\n", r"a\.csv:1: columns without a name of their own"),
    ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: not CSV \("),
    ("a.csv", b"a,b\n1,\xff\n", r"a\.csv is not UTF-8 text \(0xff behind line 1\)"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-6], r"a\.jsonl\.gz is not a sound \.gz file \("),
    ("a.jsonl.gz", b"hello", r"a\.jsonl\.gz is not a sound \.gz file \("),
    ("a.jsonl.zst", b"hello", r"a\.jsonl\.zst is not a sound \.zst file \("),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        list(read_rows(tmp_path / name, example="{}"))
    assert "\n" not in str(caught.value)


BAD_ROWS: list[tuple[Any, str]] = [
    ({"messages": TALK, "conversations": TALK}, "has messages in messages and in conversations; set data.messages_key"),
    ({"messages": TALK, "instruction": "a", "output": "b"}, "could be read as messages or as alpaca; set data.chat_f"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences (chosen, rejected) are not trained on here"),
    ({"question": "a"}, "has the fields 'question', which are no conversation of a known form"),
    ({"messages": []}, "holds no list of messages there"),
    ({"conversations": ["a"]}, 'message 1 is not an object with "role" and "content"'),
    ({"conversations": [{"from": "narrator", "value": "a"}]}, "message 1 is from 'narrator'; use one of system, human"),
    ({"conversations": [{"from": "human"}]}, 'message 1 is not an object with "from" and "value"'),
    ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "message 1: its function_call is no JSON"),
    ({"conversations": [{"from": "function_call", "value": "[]"}]}, 'is no object with "name" and "arguments"'),
    ({"instruction": "", "input": "", "output": "b"}, '"instruction" is empty'),
    ({"instruction": "a", "output": ""}, '"output" is empty'),
    ({"instruction": 1, "output": "b"}, '"instruction" holds int, not text'),
    ({"instruction": "a", "output": "b", "history": ["a"]}, "history is no list of pairs of text"),
    ({"prompt": "a", "completion": [ANSWER]}, "of prompt and completion one is text and one is messages"),
    ({"prompt": "a", "completion": ""}, "completion is empty"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "no text ('image_url')"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row)
    (problem,) = caught.value.problems
    assert says in problem
    assert "chats.jsonl:1" in problem
    assert "\n" not in problem


def test_a_run_says_the_forms_and_what_it_skipped(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(4)] + [
        {"messages": TALK},
        {"messages": [QUESTION]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    keys = ["data=chat", f"data.paths=[{tmp_path}/a.json]", f"data.cache_dir={tmp_path}/cache", "data.seq_len=200"]
    with pytest.raises(DataError, match=r"a\.json:1, record 6: no assistant turn, so nothing to train on"):
        data_of(*keys)
    said = data_of(*keys, "data.bad_rows=skip").describe()
    assert "read as 4 x alpaca, 1 x messages; 1 row(s) skipped, the first: data.paths: " in said
    with pytest.raises(
        DataError, match=r"data\.bad_rows=skip: all 6 row\(s\) were left out, the first: data\.chat_format=sh"
    ):
        data_of(*keys, "data.bad_rows=skip", "data.chat_format=sharegpt")
