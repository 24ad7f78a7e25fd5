"""Fields of chat rows decide which input the chat template gets and which tokens are trained on, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import DataError
from tests.support.data_cases import data_of
from tests.support.tokenizers_built import FAMILIES
from trainer.data.chat import ChatEncoder, Tokens
from trainer.data.formats.common import Reading
from trainer.data.messages import REFUSED_IN_MESSAGES, REFUSED_IN_ROWS, Conversation, read_conversations
from trainer.data.plain_text import PlainText
from trainer.data.tokenizer import Encoder, build_byte_tokenizer

# This template is like those of models that call tools.
TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for d in documents or [] %}<{{ d.title }}>{% endfor %}"
    "{% if mood is defined %}<{{ mood }}>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}BEGIN{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>END"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = TOOLS.replace("BEGIN", "").replace("END", "")
MARKED = TOOLS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")

SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
]
TEMPLATES = pytest.mark.parametrize("template", [PLAIN, MARKED])


def chat_of(template: str, *, control_tokens: bool = False, tokenizer: Any = None) -> ChatEncoder:
    tokenizer = tokenizer or FAMILIES["byte_level"]()
    tokenizer.chat_template = template
    plain = PlainText(tokenizer, control_tokens=control_tokens, name="data.tokenizer=folder")
    size = len(tokenizer)
    encoder = Encoder(tokenizer=tokenizer, name="folder", vocabulary=size, end=1, fingerprint="", plain=plain)
    return ChatEncoder(encoder, key="data.tokenizer")


def read(folder: Path, row: object) -> Conversation:
    (folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    (conversation,) = read_conversations(folder / "chats.jsonl", Reading())
    return conversation


def trained_text(chat: ChatEncoder, tokens: Tokens) -> list[str]:
    borders = np.flatnonzero(np.diff(np.concatenate([[False], tokens.trained, [False]]).astype(int)))
    tokenizer: Any = chat.tokenizer
    return [tokenizer.decode(tokens.ids[start:end].tolist()) for start, end in borders.reshape(-1, 2)]


@TEMPLATES
@pytest.mark.parametrize("absent", [False, True])
def test_tools_and_calls_are_written_as_apply_chat_template_does(tmp_path: Path, template: str, absent: bool) -> None:
    messages: Any = [{k: v for k, v in m.items() if v is not None or not absent} for m in CALLING]
    options = {
        "tools": [SCHEMA],
        "documents": [{"title": "sums", "text": "..."}],
        "chat_template_kwargs": {"mood": "dry"},
    }
    chat = chat_of(template)
    tokens = chat.encode(read(tmp_path, {"messages": messages, **options, "id": 7}))
    theirs: Any = chat.tokenizer.apply_chat_template(
        messages, tools=[SCHEMA], documents=options["documents"], mood="dry", tokenize=True, return_dict=True
    )
    assert tokens.ids.tolist() == theirs["input_ids"]
    written = chat.tokenizer.decode(tokens.ids.tolist())
    assert all(part in written for part in ("<tools>", '"parameters"', "<sums>", "<dry>"))
    assert trained_text(chat, tokens) == ['<call>add {"a": 2, "b": "é"}<|im_end|>', "It is 4.<|im_end|>"]
    as_text = chat.encode(read(tmp_path, {"messages": messages, **options, "tools": json.dumps([SCHEMA])}))
    assert as_text.ids.tolist() == tokens.ids.tolist()


@TEMPLATES
def test_a_weight_of_0_is_not_trained_on(tmp_path: Path, template: str) -> None:
    messages = [{**CALLING[0]}, {"role": "assistant", "content": "5", "weight": 0}]
    messages += [{**CALLING[0], "weight": None}, {"role": "assistant", "content": "4", "weight": 1}]
    chat = chat_of(template)
    tokens = chat.encode(read(tmp_path, {"messages": messages}))
    assert trained_text(chat, tokens) == ["4<|im_end|>"]
    theirs: Any = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert tokens.ids.tolist() == theirs["input_ids"]


def test_weights_that_marks_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    twice = MARKED.replace("{% endgeneration %}", "{% endgeneration %}{% generation %}.{% endgeneration %}")
    row = {"messages": [CALLING[0], {"role": "assistant", "content": "5", "weight": 0}, CALLING[0], CALLING[3]]}
    with pytest.raises(DataError, match=r"marks 4 part\(s\) of 2 turn\(s\) of the assistant, so which of them have"):
        chat_of(twice).encode(read(tmp_path, row))


@TEMPLATES
@pytest.mark.parametrize("family", ["byte_level", "whole_text", "unigram"])
def test_a_spelled_control_token_is_text_in_a_message(tmp_path: Path, template: str, family: str) -> None:
    """The template's own control tokens keep their meaning, but a message cannot end a turn."""
    tokenizer = FAMILIES[family]()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelled = [{"role": "user", "content": "hello<|im_end|>world"}, {"role": "assistant", "content": "so</s>"}]
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "so"}]
    chat = chat_of(template, tokenizer=tokenizer)
    tokens = chat.encode(read(tmp_path, {"messages": spelled}))
    assert (tokens.ids == end).sum() == 2
    assert tokenizer.eos_token_id not in tokens.ids
    assert chat.spelled == 1
    before = chat.encode(read(tmp_path, {"messages": plain})).ids.tolist()
    place = before.index(end)
    assert tokens.ids[:place].tolist() == before[:place]
    if family == "byte_level":
        assert (
            tokenizer.decode(tokens.ids.tolist()) == "<user>hello<|im_end|>world<|im_end|><assistant>so</s><|im_end|>"
        )
        assert trained_text(chat, tokens) == ["so</s><|im_end|>"]
    allowed = chat_of(template, control_tokens=True, tokenizer=tokenizer)
    tokens = allowed.encode(read(tmp_path, {"messages": spelled}))
    theirs: Any = tokenizer.apply_chat_template(spelled, tokenize=True, return_dict=True)
    assert tokens.ids.tolist() == theirs["input_ids"]
    assert (tokens.ids == end).sum() == 3


def test_a_tokenizer_with_a_template_for_tools(tmp_path: Path) -> None:
    chat = chat_of("")
    chat.tokenizer.chat_template = {"default": MARKED.replace("<tools>", "no"), "tool_use": MARKED}  # pyright: ignore[reportAttributeAccessIssue]
    chat.templates = (chat.tokenizer.get_chat_template(), chat.tokenizer.get_chat_template(tools=[]))
    row = {"messages": CALLING, "tools": [SCHEMA]}
    assert "<tools>" in chat.tokenizer.decode(chat.encode(read(tmp_path, row)).ids.tolist())


def test_what_a_template_would_drop_is_refused(tmp_path: Path) -> None:
    bytes_chat = chat_of(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", tokenizer=build_byte_tokenizer()
    )
    rows: list[tuple[dict[str, Any], str]] = [
        ({"messages": CALLING[:1] + CALLING[3:], "tools": [SCHEMA]}, "tools"),
        ({"messages": CALLING}, "tool_calls"),
        ({"messages": CALLING[:1] + CALLING[3:], "chat_template_kwargs": {"mood": "dry"}}, "mood"),
        ({"messages": [CALLING[0], {**CALLING[3], "reasoning_content": "add"}]}, "reasoning_content"),
    ]
    for row, field in rows:
        with pytest.raises(DataError) as caught:
            bytes_chat.encode(read(tmp_path, row))
        (problem,) = caught.value.problems
        assert f':1: the chat template of data.tokenizer=folder has no word of "{field}" and would drop it' in problem


def with_field(**more: object) -> Callable[[], dict[str, Any]]:
    return lambda: {"messages": [CALLING[0], CALLING[3]], **more}


def with_message(place: int = 1, **more: Any) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        messages = [CALLING[0], CALLING[3]]
        return {"messages": [{**m, **more} if number == place else m for number, m in enumerate(messages)]}

    return made


@pytest.mark.parametrize(
    ("row", "says"),
    [
        *[(with_field(**{name: "x"}), f': the field "{name}" is not supported; ') for name in sorted(REFUSED_IN_ROWS)],
        *[
            (with_message(1, **{name: "x"}), f'message 2 has the field "{name}", which is not supported; ')
            for name in sorted(REFUSED_IN_MESSAGES)
        ],
        (with_field(tools="{"), "tools is no JSON"),
        (with_field(tools={"a": 1}), "tools is no list of objects"),
        (with_field(documents=["a"]), "documents is no list of objects"),
        (with_field(chat_template_kwargs=[]), "chat_template_kwargs is no object"),
        (with_field(chat_template_kwargs={"tokenize": True}), 'sets "tokenize", which is not an option'),
        (with_message(weight=0.5), "message 2 has the weight 0.5; write 0 or 1"),
        (with_message(weight=True), "message 2 has the weight True; write 0 or 1"),
        (with_message(weight=0), 'every assistant turn has "weight": 0, so nothing to train on'),
        (with_message(train=2), "message 2 has train 2; write true or false"),
        (with_message(train=True, weight=0), "message 2 has train and weight, which say different things"),
        (with_field(system="Be brief.", messages=[{"role": "system", "content": "x"}]), 'both "system" and message 1'),
        (with_message(content=None), "holds NoneType as its content"),
        (with_message(content=None, tool_calls=[]), "holds NoneType as its content"),
        (with_message(tool_calls={"a": 1}), "holds dict as its tool_calls"),
        (with_message(0, content=None, tool_calls=[CALL]), "message 1 holds NoneType as its content"),
        (with_message(tool_calls=[{"a": "\ud800"}]), "holds half a character"),
    ],
)
def test_fields_that_are_not_honoured_are_refused(tmp_path: Path, row: Callable[[], object], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, row())
    (problem,) = caught.value.problems
    assert says in problem
    assert "chats.jsonl:1" in problem
    assert "\n" not in problem


def test_fields_for_people_are_named_once_and_empty_ones_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"messages": [CALLING[0], {**CALLING[3], "function_call": None}], "id": number, "source": "web", "images": []}
        for number in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", logger="trainer"):
        data_of(
            "data=chat",
            f"data.paths=[{tmp_path}/chats.jsonl]",
            f"data.cache_dir={tmp_path}/cache",
            "data.seq_len=96",
            "train.eval_samples=0",
        )
    (line,) = [record.getMessage() for record in caplog.records if "play no part" in record.getMessage()]
    assert line == "fields of the rows that play no part: id, source"
