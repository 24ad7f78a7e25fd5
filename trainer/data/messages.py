"""Rows of a chat file: which fields count, which are refused, and which are for people.

    {"messages": [...], "tools": [...], "documents": [...], "chat_template_kwargs": {...}, "id": 7, "source": "web"}
     |               |                                                                |
     |               given to the chat template, as apply_chat_template does          for people: named once
     {"role": "assistant", "content": "4", "weight": 0, "tool_calls": [...], ...}
                                            |            given to the chat template, which must know it
                                            1: trained on (the default); 0: not

A field that elsewhere decides what is trained on, or what the template sees, is refused where it is not honoured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from configs.errors import DataError, first_line
from trainer.data.documents import check_characters, read_rows

ROLES = ("system", "user", "assistant", "tool")
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")

_AS_WEIGHT = 'give each message of the assistant "weight": 0 or 1'
_AS_MESSAGE = "write it as a message with the role system"
_AS_OPTION = "write it into chat_template_kwargs"
_TEXT_ALONE = "this trainer reads text alone"
_MADE_HERE = "tokens and labels are made here, from the messages"
REFUSED_IN_ROWS = {
    **dict.fromkeys(("weight", "loss", "loss_mask", "loss_weight", "mask", "train", "weights"), _AS_WEIGHT),
    **dict.fromkeys(("system", "system_prompt"), _AS_MESSAGE),
    **dict.fromkeys(
        (
            "builtin_tools",
            "enable_thinking",
            "model_identity",
            "parallel_tool_calls",
            "reasoning_effort",
            "tool_choice",
        ),
        _AS_OPTION,
    ),
    **dict.fromkeys(("function_call", "functions"), 'write "tools"'),
    "chat_template": "put it into the tokenizer's folder as chat_template.jinja",
    **dict.fromkeys(("audio", "audios", "image", "images", "video", "videos"), _TEXT_ALONE),
    **dict.fromkeys(("assistant_masks", "attention_mask", "completion_mask", "input_ids", "labels"), _MADE_HERE),
}
REFUSED_IN_MESSAGES = {
    **dict.fromkeys(
        ("loss", "loss_mask", "loss_weight", "mask", "masked", "train", "train_detail", "trainable", "training"),
        _AS_WEIGHT,
    ),
    "function_call": 'write "tool_calls"',
    "refusal": 'write it as "content"',
    **dict.fromkeys(("audio", "audios", "image", "images", "video", "videos"), _TEXT_ALONE),
}
"""Field to remedy."""
EMPTY = (None, "", [], {})
"""Values that say no more than an absent field: tables give each row all fields."""

REASONING = ("reasoning_content", "reasoning", "thinking")
NEEDS_TEMPLATE = ("tool_calls", *REASONING, "channel", "recipient")
"""Fields of messages that a template without a word of them would drop."""

Message = dict[str, Any]


class Conversation(NamedTuple):
    """where: FILE:LINE. options: what else the chat template is given. unused: fields that play no part."""

    messages: list[Message]
    where: str
    options: Mapping[str, Any] = MappingProxyType({})
    unused: tuple[str, ...] = ()

    def trained(self, place: int) -> bool:
        """Whether the message of this number, from 0, is to be trained on."""
        message = self.messages[place]
        return message["role"] == "assistant" and message.get("weight") != 0


def read_conversations(path: Path, *, key: str) -> Iterator[Conversation]:
    """The conversations of a .jsonl file. key: `data.messages_key`. Raises DataError with file and line."""
    example = f'{{"{key}": [{{"role": "user", "content": ...}}, ...]}}'
    try:
        for number, row in read_rows(path, example=example):
            where = f"{path}:{number}"
            try:
                conversation = _conversation(row, key, where=where)
            except RecursionError:
                raise DataError(f"data.paths: {where}: lists within lists, too deep to read; mend the line") from None
            yield conversation
    except OSError as error:
        raise DataError(f"data.paths: {path} cannot be read ({error.strerror or first_line(error)})") from None


def _conversation(row: dict[str, Any], key: str, *, where: str) -> Conversation:
    if key not in row:
        raise DataError(
            f"data.messages_key={key}: {where} has no such field; it has {', '.join(map(repr, row)) or 'none'}"
        )
    messages, others = row[key], {name: value for name, value in row.items() if name != key and value is not None}
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"data.messages_key={key}: {where} holds no list of messages there; write"
            ' [{"role": "user", "content": ...}, ...]'
        )
    for name, remedy in REFUSED_IN_ROWS.items():
        if others.get(name) not in EMPTY:
            raise DataError(f'data.paths: {where}: the field "{name}" is not supported; {remedy}, or take it out')
    for place, message in enumerate(messages, start=1):
        _check_message(message, what=f"data.paths: {where}: message {place}")
    unused = tuple(name for name in others if name not in FOR_TEMPLATES and others[name] not in EMPTY)
    conversation = Conversation(messages, where, _options(others, where=where), unused)
    if not any(map(conversation.trained, range(len(messages)))):
        weighed = any(message["role"] == "assistant" for message in messages)
        problem = 'every assistant turn has "weight": 0' if weighed else "no assistant turn"
        raise DataError(f"data.paths: {where}: {problem}, so nothing to train on; mend or remove the line")
    return conversation


def _options(others: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The arguments of the chat template besides the messages."""
    found = {name: others[name] for name in FOR_TEMPLATES if name in others}
    if isinstance(found.get("tools"), str):
        # Tables keep schemas of many shapes as text.
        try:
            found["tools"] = json.loads(found["tools"])
        except (ValueError, RecursionError) as error:
            raise DataError(f"data.paths: {where}: tools is no JSON ({first_line(error)}); mend the line") from None
    for name in ("tools", "documents"):
        value = found.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise DataError(f"data.paths: {where}: {name} is no list of objects; mend the line")
    more = found.pop("chat_template_kwargs", {})
    if not isinstance(more, dict):
        raise DataError(f"data.paths: {where}: chat_template_kwargs is no object; mend the line")
    for name in more:
        if name in _TAKEN:
            raise DataError(
                f'data.paths: {where}: chat_template_kwargs sets "{name}", which is not an option; leave it out'
            )
    found |= more
    check_text(found, what=f"data.paths: {where}")
    return found


_TAKEN = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents"),
    *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
}


def _check_message(message: object, *, what: str) -> None:
    has_content = isinstance(message, dict) and ("content" in message or message.get("tool_calls"))
    if not isinstance(message, dict) or "role" not in message or not has_content:
        raise DataError(f'{what} is not an object with "role" and "content"; mend or remove the line')
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise DataError(f"{what} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise DataError(f"{what} holds {type(content).__name__} as its content, not text; write text")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise DataError(f"{what} holds {type(calls).__name__} as its tool_calls, not a list of objects; mend the line")
    for name, remedy in REFUSED_IN_MESSAGES.items():
        if message.get(name) not in EMPTY:
            raise DataError(f'{what} has the field "{name}", which is not supported; {remedy}, or take it out')
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{what} has the weight {weight!r}; write 0 or 1")
    if weight and role != "assistant":
        raise DataError(f"{what} has the weight 1 and the role {role}; only turns of the assistant are trained on")
    check_text(message, what=what)


def check_text(value: object, *, what: str) -> None:
    """Raise DataError for a JSON value with text that UTF-8 cannot spell."""
    if isinstance(value, str):
        check_characters(value, what=what)
    elif isinstance(value, list):
        for item in value:
            check_text(item, what=what)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, what=what)
            check_text(item, what=what)
