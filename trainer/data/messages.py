"""Fields of a conversation file: those that count, those that are refused, and information for people.

A row of any form (`formats`) becomes a row of this one:

    {"messages": [...], "tools": [...], "documents": [...], "chat_template_kwargs": {...}, "id": 7, "source": "web"}
     |               |                                                                |
     |               given to the chat template, as apply_chat_template does          for people: named once
     {"role": "assistant", "content": "4", "weight": 0, "tool_calls": [...], ...}
                                            |            given to the chat template, which must know it
                                            1: trained on (the default of the assistant's messages); 0: not

A field that decides elsewhere what is trained on, or what the template gets, is refused unless it is honoured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from configs.errors import DataError, first_line
from trainer.data.documents import check_characters
from trainer.data.formats import FORMATS, to_messages
from trainer.data.formats.common import FLAGS, MESSAGE_FIELDS, Reading
from trainer.data.rows import ABSENT, names_of, read_rows, value_of
from trainer.data.split import Split

ROLES = ("system", "developer", "user", "assistant", "tool")
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")

_AS_WEIGHT = 'give each message of the assistant "weight": 0 or 1'
_AS_OPTION = "write it into chat_template_kwargs"
_TEXT_ALONE = "this trainer reads text alone"
_MADE_HERE = "tokens and labels are made here, from the messages"
REFUSED_IN_ROWS = {
    **dict.fromkeys(("weight", "loss", "loss_mask", "loss_weight", "mask", "train", "weights"), _AS_WEIGHT),
    "system_prompt": 'name it "system"',
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
        ("loss_mask", "loss_weight", "mask", "masked", "train_detail"),
        _AS_WEIGHT,
    ),
    "function_call": 'write "tool_calls"',
    "refusal": 'write it as "content"',
    **dict.fromkeys(("audio", "audios", "image", "images", "video", "videos"), _TEXT_ALONE),
}
"""Field to remedy."""
EMPTY = (None, "", [], {})
"""Values that mean the same as an absent field: tables give each row all fields."""

REASONING = ("reasoning_content", "reasoning", "thinking")
NEEDS_TEMPLATE = ("tool_calls", *REASONING, "channel", "recipient", "developer")
"""Fields and roles of messages that a template would drop if it does not mention them."""

Message = dict[str, Any]


class Conversation(NamedTuple):
    """where: FILE:LINE. options: further arguments of the chat template. unused: ignored fields. roles: roles whose
    messages are trained on by default. form: of the row."""

    messages: list[Message]
    where: str
    options: Mapping[str, Any] = MappingProxyType({})
    unused: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("assistant",)
    form: str = "messages"

    def trained(self, place: int) -> bool:
        """Whether the message of this index, from 0, is to be trained on."""
        message = self.messages[place]
        weight = message.get("weight")
        return message["role"] in self.roles if weight is None else weight == 1


def read_conversations(
    path: Path | Split, reading: Reading, skipped: list[str] | None = None
) -> Iterator[Conversation]:
    """The conversations of a file, or of a split of a data set. Raises DataError with the place; with `reading.skip`,
    the problem of a row goes into `skipped` instead."""
    missing = {name: theirs for name, theirs in reading.fields.items() if name not in MESSAGE_FIELDS}
    row: dict[str, Any] = {}
    example = FORMATS[reading.form or "messages"].EXAMPLE
    try:
        for where, row in path.rows() if isinstance(path, Split) else read_rows(path, example=example):
            missing = {name: theirs for name, theirs in missing.items() if value_of(row, theirs) is ABSENT}
            try:
                conversation = _conversation(row, reading, where=where)
            except DataError as error:
                if not reading.skip or skipped is None:
                    raise
                skipped.append(str(error))
                continue
            except RecursionError:
                raise DataError(f"data.paths: {where}: lists within lists, too deep to read; mend the line") from None
            yield conversation
    except OSError as error:
        raise DataError(f"data.paths: {path} cannot be read ({error.strerror or first_line(error)})") from None
    if missing and row:
        name, theirs = next(iter(missing.items()))
        raise DataError(f"data.fields.{name}={theirs}: no row of {path} has that field; they have {names_of(row)}")


def _conversation(row: dict[str, Any], reading: Reading, *, where: str) -> Conversation:
    form, row = to_messages(row, reading, where=where)
    messages, others = row.pop("messages"), {name: value for name, value in row.items() if value is not None}
    messages = _with_system(messages, others, where=where)
    for name, remedy in REFUSED_IN_ROWS.items():
        if others.get(name) not in EMPTY:
            raise DataError(f'data.paths: {where}: the field "{name}" is not supported; {remedy}, or take it out')
    messages = [_checked(each, what=f"data.paths: {where}: message {n}") for n, each in enumerate(messages, start=1)]
    unused = tuple(name for name in others if name not in FOR_TEMPLATES and others[name] not in EMPTY)
    options = _options(others, where=where)
    conversation = Conversation(messages, where, options, unused, reading.trained, form)
    if not any(map(conversation.trained, range(len(messages)))):
        who = " or ".join(reading.trained)
        weighed = any(message["role"] in reading.trained for message in messages)
        problem = f'every {who} turn has "weight": 0' if weighed else f"no {who} turn"
        raise DataError(f"data.paths: {where}: {problem}, so nothing to train on; mend or remove the line")
    return conversation


def _with_system(messages: list[Any], others: dict[str, Any], *, where: str) -> list[Any]:
    """The messages, with the row's field `system` as the first."""
    system = others.pop("system", None)
    if system in EMPTY:
        return messages
    if not isinstance(system, str):
        raise DataError(f'data.paths: {where}: "system" holds {type(system).__name__}, not text; mend the line')
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise DataError(f'data.paths: {where}: both "system" and message 1 are of the system; take one out')
    return [{"role": "system", "content": system}, *messages]


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


def _checked(message: object, *, what: str) -> Message:
    """The message with the weight that its flags mean."""
    has_content = isinstance(message, dict) and ("content" in message or message.get("tool_calls"))
    if not isinstance(message, dict) or "role" not in message or not has_content:
        raise DataError(f'{what} is not an object with "role" and "content"; mend or remove the line')
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        raise DataError(
            f"{what} has the role {role!r}; use one of {', '.join(ROLES)}, or say in data.roles who that is"
        )
    if isinstance(content, list) and content:
        _check_parts(content, what=what)
    elif not isinstance(content, str) and not (content is None and calls and role == "assistant"):
        raise DataError(f"{what} holds {type(content).__name__} as its content, not text; write text")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise DataError(f"{what} holds {type(calls).__name__} as its tool_calls, not a list of objects; mend the line")
    for name, remedy in REFUSED_IN_MESSAGES.items():
        if message.get(name) not in EMPTY:
            raise DataError(f'{what} has the field "{name}", which is not supported; {remedy}, or take it out')
    check_text(message, what=what)
    return _weighed(message, what=what)


def _check_parts(parts: list[Any], *, what: str) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                f"{what} holds a part of its content that is no text ({kind!r}); {_TEXT_ALONE}: write"
                ' {"type": "text", "text": ...}'
            )


def _weighed(message: Message, *, what: str) -> Message:
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"{what} has the weight {weight!r}; write 0 or 1")
    flags = {name: message[name] for name in FLAGS if message.get(name) is not None}
    if not flags:
        return message
    for name, value in flags.items():
        if value not in (0, 1):
            raise DataError(f"{what} has {name} {value!r}; write true or false")
    said = {int(value) for value in (*flags.values(), *([] if weight is None else [weight]))}
    if len(said) > 1:
        names = " and ".join([*flags, *([] if weight is None else ["weight"])])
        raise DataError(f"{what} has {names}, which say different things; keep one")
    return {**{name: value for name, value in message.items() if name not in flags}, "weight": said.pop()}


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
