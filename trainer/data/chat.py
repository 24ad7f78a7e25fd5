"""Conversations to tokens: the tokenizer's own chat template, and which tokens are the assistant's.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

    <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n      the template's text
    ........................................................########              trained on: the assistant's part

If the template marks the assistant's part with {% generation %}, that part is used; otherwise `spans` finds it. A
message that spells a control token spells text (`plain_text`). `messages` defines which fields of a row count. Loss on
the assistant's turns alone: Ouyang et al. 2022 (InstructGPT).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError, first_line
from trainer.data.messages import NEEDS_TEMPLATE, REASONING, Conversation
from trainer.data.parts import Contents
from trainer.data.plain_text import GUARD
from trainer.data.spans import Rendering, Span
from trainer.data.tokenizer import BYTES, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of the tokenizer `bytes`, which has none of its own; its marks are plain text, byte by byte."""


class Tokens(NamedTuple):
    """ids: [tokens] int64. trained: [tokens], True where the assistant speaks."""

    ids: NDArray[np.int64]
    trained: NDArray[np.bool_]


class ChatEncoder:
    """Conversations to tokens by the template of `encoder`'s tokenizer. key: config key with its name. spelled: number
    of conversations whose text spelled a control token."""

    def __init__(self, encoder: Encoder, *, key: str) -> None:
        """Raises DataError for a tokenizer without a chat template, or without the positions of its tokens."""
        self.tokenizer: PreTrainedTokenizerBase = encoder.tokenizer
        self.plain = encoder.plain
        self.name = f"{key}={encoder.name}"
        self.spelled = 0
        self._contents: dict[str, Contents] = {}
        if encoder.name == BYTES:
            self.tokenizer.chat_template = CHATML
        try:
            # Some tokenizers have another one for rows with tools.
            self.templates = (self.tokenizer.get_chat_template(), self.tokenizer.get_chat_template(tools=[]))
        except ValueError as error:
            raise DataError(
                f"{self.name}: has no chat template ({first_line(error)}); give the tokenizer of a chat model, put a"
                f" chat_template.jinja into its folder, or set data.tokenizer={BYTES}"
            ) from None
        if not all(isinstance(template, str) for template in self.templates):
            raise DataError(f"{self.name}: its chat_template is no text; mend its tokenizer_config.json")
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{self.name}: cannot tell which text a token is from; give a tokenizer with a tokenizer.json"
            )

    def template(self, conversation: Conversation) -> str:
        return self.templates["tools" in conversation.options]

    def encode(self, conversation: Conversation) -> Tokens:
        """Raises DataError, with file and line, if the template refuses the conversation or hides a turn."""
        self._check_known(conversation)
        marked = GENERATION.search(self.template(conversation)) is not None
        from jinja2 import TemplateError

        try:
            guarded = self._guarded(conversation)
            rendering = Rendering(self.tokenizer, guarded, tuple(self.plain.control.values()), self.name)
            text, spans = self._marked(rendering) if marked else rendering.spans()
        except DataError:
            raise
        except TemplateError as error:
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} refuses the messages"
                f" ({first_line(error)}); mend or remove the line"
            ) from None
        # A template is a program: it can fail in any way.
        except Exception as error:
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} fails on the messages"
                f" ({type(error).__name__}: {first_line(error)}); mend or remove the line"
            ) from None
        encoded = self.plain.encode_rendered(text)
        assert encoded.starts is not None
        self.spelled += GUARD in text
        trained = np.zeros(len(encoded.ids), np.bool_)
        for start, end in spans:
            trained |= (encoded.starts >= start) & (encoded.starts < end)
        if not trained.any():
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} leaves nothing of the assistant's"
                " turns; mend or remove the line"
            )
        return Tokens(encoded.ids, trained)

    def _check_known(self, conversation: Conversation) -> None:
        """Raise DataError for a field that the template does not mention, and would drop."""
        template = self.template(conversation)
        given = dict.fromkeys(conversation.options)
        given |= dict.fromkeys(key for message in conversation.messages for key in NEEDS_TEMPLATE if message.get(key))
        given |= dict.fromkeys(m["role"] for m in conversation.messages if m["role"] in NEEDS_TEMPLATE)
        for field in given:
            names = REASONING if field in REASONING and _reasoning_has_one_name() else (field,)
            if not any(re.search(rf"\b{re.escape(name)}\b", template) for name in names):
                raise DataError(
                    f'data.paths: {conversation.where}: the chat template of {self.name} has no word of "{field}" and'
                    " would drop it; give a tokenizer whose template writes it, or take the field out"
                )

    def _guarded(self, conversation: Conversation) -> Conversation:
        """The message for the template: without null fields, which break many templates, and with spelled-out control
        tokens disguised."""
        template = self.template(conversation)
        if template not in self._contents:
            self._contents[template] = Contents(self.tokenizer, template)
        write = self._contents[template].written
        messages = [
            {key: write(value) if key == "content" else value for key, value in message.items() if value is not None}
            for message in conversation.messages
        ]
        options = self.plain.guarded(dict(conversation.options))
        return conversation._replace(messages=self.plain.guarded(messages), options=options)

    def _marked(self, rendering: Rendering) -> tuple[str, list[Span]]:
        """By the template's own marks. The tokenizer's `return_assistant_tokens_mask` reads the same marks, but if a
        turn ends in a space that some tokenizers assign to no token, it also marks everything after it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = rendering.conversation
        options: dict[str, Any] = {**self.tokenizer.special_tokens_map, **conversation.options}
        rendered: Any = render_jinja_template(
            conversations=[conversation.messages],
            chat_template=self.template(conversation),
            return_assistant_tokens_mask=True,
            **options,
        )
        (text,), (spans,) = rendered
        places = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        chosen = list(filter(conversation.trained, range(len(conversation.messages))))
        others = [rendering.of_content(place, text) for place in chosen if place not in places]
        if all(map(conversation.trained, places)):
            return text, [*spans, *others]
        if len(spans) != len(places):
            raise DataError(
                f"data.paths: {conversation.where}: the chat template of {self.name} marks {len(spans)} part(s) of"
                f' {len(places)} turn(s) of the assistant, so which of them have "weight": 0 cannot be seen; take the'
                " weights out, or {% generation %} out of the template"
            )
        return text, [*others, *(span for span, place in zip(spans, places, strict=True) if place in chosen)]


def _reasoning_has_one_name() -> bool:
    """Whether this transformers gives a template the reasoning under each of the common names."""
    from transformers.utils import chat_template_utils

    return hasattr(chat_template_utils, "_alias_reasoning_fields")
