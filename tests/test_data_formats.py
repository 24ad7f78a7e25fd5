"""Conversations in the forms and files that people have: their tokens are those of `apply_chat_template`, and what is
trained on is the assistant's."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.choices import ChatFormat
from configs.errors import CookbookError, DataError
from configs.schema_data import Data
from tests.support.data_cases import data_of
from tests.support.tokenizers_built import FAMILIES
from trainer.data.chat import ChatEncoder
from trainer.data.formats import FORMATS
from trainer.data.formats.common import Reading
from trainer.data.messages import Conversation, read_conversations
from trainer.data.plain_text import PlainText
from trainer.data.rows import read_rows
from trainer.data.rules import EVERYWHERE, ON_CONDITION, READ_BY
from trainer.data.tokenizer import Encoder

HEAD = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
SAID = "BEGIN{% if m.content %}{{ m.content }}{% endif %}" + CALLS + "<|im_end|>END"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
EACH = "{% for m in messages %}<{{ m.role }}>"
PLAIN = HEAD + EACH + SAID.replace("BEGIN", "").replace("END", "") + "{% endfor %}" + PROMPT
MARKED = (
    HEAD
    + EACH
    + "{% if m.role == 'assistant' %}"
    + SAID.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
    + "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    + PROMPT
)
# As DeepSeek's and Qwen's thinking models: the prompt opens the thoughts, and those of earlier turns are left out.
THINKING = (
    EACH + "{% set said = m.content.split('</think>')[-1] if not loop.last else m.content %}"
    "{{ said }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
# As Qwen's models that think on request: an empty pair of tags in the last turn alone.
ON_REQUEST = (
    EACH + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
)
# As models of pictures and text: parts, or text.
PARTS = (
    EACH + "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}" + PROMPT
)
PARTS_ALONE = EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}" + PROMPT

TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}
QUESTION, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TALK = [QUESTION, ANSWER, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "é 中."}]
SYSTEM = {"role": "system", "content": "Be brief."}
PART = {"type": "text", "text": "2 + "}


def chat_of(template: str) -> ChatEncoder:
    tokenizer = FAMILIES["byte_level"]()
    tokenizer.chat_template = template
    plain = PlainText(tokenizer, control_tokens=False, name="data.tokenizer=folder")
    encoder = Encoder(tokenizer=tokenizer, name="folder", vocabulary=len(tokenizer), end=1, fingerprint="", plain=plain)
    return ChatEncoder(encoder, key="data.tokenizer")


def read(folder: Path, row: object, **reading: Any) -> Conversation:
    (folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    (conversation,) = read_conversations(folder / "chats.jsonl", Reading(**reading))
    return conversation


def trained(chat: ChatEncoder, conversation: Conversation) -> list[str]:
    ids, learnt = chat.encode(conversation)
    borders = np.flatnonzero(np.diff(np.concatenate([[False], learnt, [False]]).astype(int)))
    tokenizer: Any = chat.tokenizer
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in borders.reshape(-1, 2)]


def theirs(chat: ChatEncoder, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    found: Any = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return found["input_ids"]


# One row of each form: the form that is found, the messages and options it must mean, what is trained on.
ROWS: dict[str, tuple[Any, str, list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "messages": ({"messages": TALK, "id": 7}, "messages", TALK, {}, ["4", "é 中."]),
    "messages under conversations": ({"conversations": TALK}, "messages", TALK, {}, ["4", "é 中."]),
    "content parts": (
        {"messages": [{"role": "user", "content": [PART, {"type": "text", "text": "2?"}]}, ANSWER]},
        *("messages", TALK[:2], {}, ["4"]),
    ),
    "train of a message": (
        {"messages": [QUESTION, {**ANSWER, "train": False}, TALK[2], {**TALK[3], "loss": True}]},
        *("messages", TALK, {}, ["é 中."]),
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "gpt", "value": "4", "weight": 0},
                {"from": "human", "value": "so?"},
                {"from": "gpt", "value": "é 中."},
            ],
            "system": "Be brief.",
        },
        *("sharegpt", [SYSTEM, *TALK], {}, ["é 中."]),
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "2 + 2?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": json.dumps([TOOL]),
        },
        "sharegpt",
        [
            QUESTION,
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "4"},
            ANSWER,
        ],
        {"tools": [{"type": "function", "function": TOOL}]},
        ['<call>add {"a": 2, "b": 2}', "4"],
    ),
    "alpaca": ({"instruction": "2 + 2?", "input": "", "output": "4"}, "alpaca", TALK[:2], {}, ["4"]),
    "alpaca with all": (
        {
            "instruction": "so",
            "input": "?",
            "output": "é 中.",
            "system": "Be brief.",
            "history": [["2 + 2?", "4"]],
            "text": "the prompt once more",
        },
        *("alpaca", [SYSTEM, *TALK[:2], {"role": "user", "content": "so\n?"}, TALK[3]], {}, ["4", "é 中."]),
    ),
    "completion": ({"prompt": "2 + 2?", "completion": "4"}, "completion", TALK[:2], {}, ["4"]),
    "completion of messages": (
        {"prompt": TALK[:3], "completion": TALK[3:]},
        *("completion", TALK, {}, ["é 中."]),
    ),
}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("name", ROWS)
def test_each_form_has_the_tokens_of_apply_chat_template(tmp_path: Path, name: str, template: str) -> None:
    row, form, messages, options, spoken = ROWS[name]
    chat = chat_of(template)
    conversation = read(tmp_path, row)
    assert conversation.form == form
    assert chat.encode(conversation).ids.tolist() == theirs(chat, messages, **options)
    assert trained(chat, conversation) == [f"{text}<|im_end|>" for text in spoken]


@pytest.mark.parametrize("form", FORMATS)
def test_the_examples_of_the_docs_are_read(tmp_path: Path, form: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    block = page.split(f"\n### {form}\n")[1].split("```json\n")[1].split("```")[0]
    (tmp_path / "a.jsonl").write_text(block)
    found = list(read_conversations(tmp_path / "a.jsonl", Reading()))
    assert [each.form for each in found] == [form] * 3
    assert all(trained(chat_of(PLAIN), each) for each in found)


def test_the_choices_are_the_table() -> None:
    assert list(ChatFormat) == ["auto", *FORMATS]


def test_marks_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    chat = chat_of(MARKED)
    ids, learnt = chat.encode(read(tmp_path, ROWS["alpaca with all"][0]))
    found: Any = chat.tokenizer.apply_chat_template(
        ROWS["alpaca with all"][2], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (ids.tolist(), learnt.astype(int).tolist()) == (found["input_ids"], found["assistant_masks"])


@pytest.mark.parametrize(
    ("template", "said", "spoken"),
    [
        (THINKING, ["4", "5"], ["4<|im_end|>", "5<|im_end|>"]),
        (
            THINKING,
            ["<think>\nadd</think>4", "<think>\nadd</think>5"],
            ["4<|im_end|>", "add</think>5<|im_end|>"],
        ),
        (ON_REQUEST, ["4", "5"], ["4<|im_end|>", "<think>\n\n</think>\n\n5<|im_end|>"]),
    ],
)
def test_templates_of_models_that_think(tmp_path: Path, template: str, said: list[str], spoken: list[str]) -> None:
    """An opening that the prompt writes is not trained on; what the template writes of an answer is."""
    chat = chat_of(template)
    messages = [QUESTION, {"role": "assistant", "content": said[0]}, TALK[2], {"role": "assistant", "content": said[1]}]
    conversation = read(tmp_path, {"messages": messages})
    assert chat.encode(conversation).ids.tolist() == theirs(chat, messages)
    assert trained(chat, conversation) == spoken


@pytest.mark.parametrize("template", [PARTS, PARTS_ALONE])
def test_templates_that_write_parts(tmp_path: Path, template: str) -> None:
    chat = chat_of(template)
    parts = [PART, {"type": "text", "text": "2?"}]
    messages = [{"role": "user", "content": parts}, ANSWER]
    whole = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (QUESTION, ANSWER)]
    expected = theirs(chat, whole)
    assert chat.encode(read(tmp_path, {"messages": messages})).ids.tolist() == expected
    assert trained(chat, read(tmp_path, {"messages": TALK})) == ["4<|im_end|>", "é 中.<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_whose_messages_are_trained_on(tmp_path: Path, template: str) -> None:
    chat = chat_of(template)
    row = {"messages": [SYSTEM, QUESTION, ANSWER, {**TALK[2], "weight": 0}, TALK[3]]}
    both = read(tmp_path, row, trained=("user", "assistant"))
    assert trained(chat, both) == ["2 + 2?<|im_end|>", "4<|im_end|>", "é 中.<|im_end|>"]
    assert trained(chat, read(tmp_path, row, trained=("user",))) == ["2 + 2?<|im_end|>"]
    row["messages"][0] = {**SYSTEM, "weight": 1}
    assert trained(chat, read(tmp_path, row))[0] == "Be brief.<|im_end|>"
    first = read(tmp_path, {"messages": [ANSWER, QUESTION, ANSWER]})
    assert trained(chat, first) == ["4<|im_end|>"] * 2


def test_fields_and_roles_have_the_names_of_the_file(tmp_path: Path) -> None:
    asked = {"instruction": "question.text", "output": "answer"}
    row = {"question": {"text": "2 + 2?"}, "answer": "4", "output": 1}
    assert read(tmp_path, row, fields=asked).messages == TALK[:2]
    inside = {"data": {"turns": [{"who": "customer", "text": "2 + 2?"}, {"who": "agent", "text": "4"}]}, "id": 1}
    names = {"fields": {"role": "who", "content": "text"}, "roles": {"customer": "user", "agent": "assistant"}}
    found = read(tmp_path, inside, key="data.turns", **names)
    assert (found.messages, found.unused) == (TALK[:2], ("id",))
    with pytest.raises(
        DataError, match=r"data.fields.input=context: no row of .*chats.jsonl has that field; they have 'q"
    ):
        read(tmp_path, row, fields={**asked, "input": "context"})


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
    """Columns are the same for all rows: the other tool's argument is there, and null."""
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


def test_a_data_set_by_its_name_gives_the_samples_of_its_file(tmp_path: Path) -> None:
    """In a table each row has the fields of all others, and an object those of all objects."""
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
