"""Keys of `data` are refused if they do not go together. A data set can be given by its name."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from configs.errors import CookbookError, DataError
from configs.schema_data import Data
from tests.support.data_cases import data_of
from tests.support.tokenizers_built import FAMILIES
from tests.test_data_formats import PLAIN
from trainer.data.rules import EVERYWHERE, ON_CONDITION, READ_BY


def test_a_data_set_by_its_name_gives_the_samples_of_its_file(tmp_path: Path) -> None:
    """In a table, each row has the fields of all rows, and each object has the fields of all objects."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]} for n in range(9)
    ]
    rows[4]["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows[4]["tools"] = [{"type": "function", "function": {"name": "add"}}]
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["data=chat", f"data.cache_dir={tmp_path}/cache", "data.seq_len=200", "train.micro_batch_size=2"]
    tokenizer = FAMILIES["byte_level"]()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    keys += [f"data.tokenizer={tmp_path}/tokenizer", "model.config.vocab_size=600"]
    by_name, by_path = (data_of(*keys, word) for word in (f"data.name={folder}", f"data.paths=[{folder}]"))
    for one, other in islice(zip(by_name.steps(), by_path.steps(), strict=True), 5):
        assert [batch.input_ids.tolist() for batch in one] == [batch.input_ids.tolist() for batch in other]
    assert f"chat: {folder}, read as 9 x messages: " in by_name.describe()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    assert "read as 4 x messages" in data_of(*keys, f"data.name={folder}").describe()
    (folder / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    with pytest.raises(DataError, match=rf"^data\.name={folder}: split train, row 1: no assistant turn, so nothing"):
        data_of(*keys, f"data.name={folder}")
    with pytest.raises(DataError, match=rf"^data\.name={folder}: split test cannot be opened"):
        data_of(*keys, f"data.name={folder}", "data.split=test")


@pytest.mark.parametrize(
    "row", ['{"messages": [{"role": "user", "content": "?"}]}\n', "no JSON\n"], ids=["no answer", "no row"]
)
def test_a_file_to_validate_on_has_its_own_key(tmp_path: Path, row: str) -> None:
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}]}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text((json.dumps(good) + "\n") * 9)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(row)
    keys = ["data=chat", f"data.cache_dir={tmp_path}/cache", f"data.validation_paths=[{bad}]"]
    for training in (f"data.name={tmp_path}/set", f"data.paths=[{tmp_path}/set]"):
        with pytest.raises(DataError, match=rf"^data\.validation_paths: {bad}:1: no"):
            data_of(*keys, training)
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one and two"}\n' * 9)
    bad.write_text("no JSON\n")
    with pytest.raises(DataError, match=rf"^data\.validation_paths: {bad}:1: not JSON"):
        data_of("data=files", f"data.paths=[{tmp_path}/set]", *keys[1:])


def test_a_hub_that_stops_answering_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def cut(*_: Any, **__: Any) -> None:
        raise ConnectionError("the connection was cut\nin the middle")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [])
    monkeypatch.setattr(datasets, "load_dataset_builder", cut)
    with pytest.raises(DataError) as refused:
        data_of("data=chat", "data.name=somebody/chats")
    (line,) = refused.value.problems
    assert line.startswith("data.name=somebody/chats: the hub does not say which commit it is (the connection was cut")
    assert "\n" not in line


def test_every_key_of_the_data_has_its_rule() -> None:
    known = {*READ_BY, *EVERYWHERE, *ON_CONDITION}
    assert known == {field.name for field in fields(Data)}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            "data=synthetic data.shuffle=false",
            "data.shuffle=false: is for all but data=synthetic, this is data=synthetic",
        ),
        ("data=synthetic data.validation_fraction=0.1", "data.validation_fraction=0.1: is for all but data=synthetic"),
        ("data=builtin data.ignore_fraction=0.1", "data.ignore_fraction=0.1: is for data=synthetic, this is data=bu"),
        ("data=chat data.paths=[x] data.name=y", "data.name=y: data.paths=['x'] says what is read; give one of them"),
        ("data=chat data.paths=[x] data.split=y", "data.split=y: is of the data set that data.name names; set that"),
        (
            "data=chat",
            "data.paths=[]: data=chat needs at least one file, folder or pattern: data.paths=[corpus/], or d",
        ),
        (
            "data=files data.paths=[x] data.validation_paths=[y] data.validation_fraction=0.1",
            "data.validation_fraction=0.1: data.validation_paths=['y'] says what is validated on, and nothing is held",
        ),
        (
            "data=chat data.name=x data.validation_paths=[y] data.validation_split=z",
            "data.validation_split=z: data.validation_paths=['y'] says what is validated on; give one of them",
        ),
        (
            "data=chat data.paths=[x] data.chat_format=alpaca data.messages_key=y",
            "data.messages_key=y: data.chat_format=alpaca has no list of messages; name its fields in data.fields",
        ),
        ("data=files data.paths=[x] data.chat_format=alpaca", "data.chat_format=alpaca: is for data=chat"),
        (
            "data=chat data.paths=[x] data.train_roles=[robot]",
            "data.train_roles=['robot']: robot is no role; use one of",
        ),
        ("data=chat data.paths=[x] data.train_roles=[]", "data.train_roles=[]: nothing would be trained on"),
        ("data=chat data.paths=[x] data.roles={a:b}", "data.roles.a=b: is no role"),
        (
            "data=chat data.paths=[x] data.fields={messages:b}",
            "data.fields.messages=b: is no field that is read here; data.m",
        ),
    ],
)
def test_keys_that_are_refused(keys: str, says: str) -> None:
    with pytest.raises(CookbookError) as caught:
        data_of(*keys.split())
    assert any(problem.startswith(says) for problem in caught.value.problems)
