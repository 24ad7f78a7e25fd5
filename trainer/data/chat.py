"""Conversations to tokens: the tokenizer's own chat template, and which tokens are the assistant's.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

    <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n      the template's text
    ........................................................########              trained on: the assistant's part

Where the template marks the assistant's part with {% generation %}, that is it. Elsewhere it is what the text of the
first k messages and the assistant's header lacks of the text of the first k + 1. That holds only if each of these
texts begins the whole one; a template that renders a message differently when others follow is told, not guessed at.
Loss on the assistant's turns alone: Ouyang et al. 2022 (InstructGPT).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from trainer.data.documents import check_characters, read_rows
from trainer.data.tokenizer import BYTES, Encoder, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SUFFIX = ".jsonl"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of the tokenizer `bytes`, which has none of its own; its marks are plain text, byte by byte."""

Message = dict[str, str]
Span = tuple[int, int]


class Conversation(NamedTuple):
    """where: FILE:LINE."""

    messages: list[Message]
    where: str


class Tokens(NamedTuple):
    """ids: [tokens] int64. trained: [tokens], True where the assistant speaks."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


class ChatEncoder:
    """Conversations to tokens by the template of `encoder`'s tokenizer. key: where its name stands in the config."""

    def __init__(self, encoder: Encoder, *, key: str) -> None:
        """Raises DataError for a tokenizer without a chat template, or that cannot tell where its tokens are from."""
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.name = f"{key}={encoder.name}"
        if encoder.name == BYTES:
            self.tokenizer.chat_template = CHATML
        try:
            self.template = self.tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"{self.name}: has no chat template ({first_line(error)}); give the tokenizer of a chat model, put a"
                f" chat_template.jinja into its folder, or set data.tokenizer={BYTES}"
            ) from None
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{self.name}: cannot tell which text a token is from; give a tokenizer with a tokenizer.json"
            )
        self.marked = GENERATION.search(self.template) is not None

    def encode(self, conversation: Conversation) -> Tokens:
        """Raises DataError, with file and line, where the template refuses the conversation or hides a turn."""
        from jinja2 import TemplateError

        try:
            text, spans = self._marked(conversation) if self.marked else self._by_prefixes(conversation)
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} refuses the messages"
                f" ({first_line(error)}); mend or remove the line"
            ) from None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        trained = np.zeros(len(offsets), np.bool_)
        for start, end in spans:
            trained |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
        if not trained.any():
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} leaves nothing of the assistant's"
                " turns; mend or remove the line"
            )
        return Tokens(np.asarray(encoded["input_ids"], np.int64), trained)

    def _marked(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """By the template's own marks. The tokenizer's `return_assistant_tokens_mask` reads the same ones, but where a
        turn ends in a blank that some tokenizers count to no token it marks all that follows too."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[conversation.messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **options,
        )
        (text,), (spans,) = rendered
        return text, spans

    def _by_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        messages = conversation.messages
        whole = self._render(messages)
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if place == 0:
                raise DataError(
                    f"data.paths: {conversation.where}: begins with the assistant, whose header cannot be told from its"
                    f" words without {{% generation %}} in the chat template of {self.name}; begin with another role"
                )
            before, after = self._render(messages[:place], prompt=True), self._render(messages[: place + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"data.paths: {conversation.where}: the chat template of {self.name} renders message {place + 1}"
                    " differently when others follow, so the assistant's words cannot be told from the rest; mark them"
                    " with {% generation %} ... {% endgeneration %} in the template"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text


def read_conversations(path: Path, *, key: str) -> Iterator[Conversation]:
    """The conversations of a .jsonl file. key: `data.messages_key`. Raises DataError with file and line."""
    example = f'{{"{key}": [{{"role": "user", "content": ...}}, ...]}}'
    try:
        for number, row in read_rows(path, example=example):
            yield Conversation(_messages(row, key, where=f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise DataError(f"data.paths: {path} cannot be read ({error.strerror or first_line(error)})") from None


def _messages(row: dict[str, Any], key: str, *, where: str) -> list[Message]:
    if key not in row:
        raise DataError(
            f"data.messages_key={key}: {where} has no such field; it has {', '.join(map(repr, row)) or 'none'}"
        )
    messages = row[key]
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"data.messages_key={key}: {where} holds no list of messages there; write"
            ' [{"role": "user", "content": ...}, ...]'
        )
    for place, message in enumerate(messages, start=1):
        _check_message(message, what=f"data.paths: {where}: message {place}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"data.paths: {where}: no assistant turn, so nothing to train on; mend or remove the line")
    return messages


def _check_message(message: object, *, what: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f'{what} is not an object with "role" and "content"; mend or remove the line')
    if message["role"] not in ROLES:
        raise DataError(f"{what} has the role {message['role']!r}; use one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise DataError(f"{what} holds {type(message['content']).__name__} as its content, not text; write text")
    check_characters(message["content"], what=what)
