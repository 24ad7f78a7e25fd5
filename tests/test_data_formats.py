"""Conversations in common formats and files get the tokens of `apply_chat_template`.

Only the assistant's tokens are trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.choices import ChatFormat
from configs.errors import DataError
from tests.support.tokenizers_built import FAMILIES
from trainer.data.chat import ChatEncoder
from trainer.data.formats import FORMATS
from trainer.data.formats.common import Reading
from trainer.data.messages import Conversation, read_conversations
from trainer.data.plain_text import PlainText
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
# As in DeepSeek's and Qwen's thinking models, the prompt opens the thoughts. Thoughts of earlier turns are left out.
THINKING = (
    EACH + "{% set said = m.content.split('</think>')[-1] if not loop.last else m.content %}"
    "{{ said }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
# As in Qwen's models that think on request, only the last turn has an empty pair of tags.
ON_REQUEST = (
    EACH + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
)
# As in models of images and text, the content is a list of parts or a string.
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


# One row of each format: the detected format, the expected messages and template options, the text trained on.
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
    """An opening that the prompt writes is not trained on. The text that the template writes of an answer is."""
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
