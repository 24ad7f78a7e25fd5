"""The part of a rendered conversation that belongs to a message, for templates that do not mark the assistant's part.

    before   <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n                 with the answer's header
    after    <|im_start|>user\\n2 + 2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
    the part                                                             ################

An answer is the rendering of the first k + 1 messages minus that of the first k with the assistant's header. Two kinds
of template need more:

- The header of a reasoning model may open its thoughts, `<think>`. An answer without thoughts follows the header
  without it; with thoughts, the opening belongs to the header, as in generation.
- Thoughts of earlier answers may be omitted, or an empty pair of tags put into the last one: then the first k + 1
  messages are rendered differently when others follow. The answer then ends with the first control token that ends an
  answer, which no text can spell.

A template that renders the messages before an answer differently is refused by name. For other roles than the
assistant, and for an answer that begins a conversation, the part is the content and the end of the message: a template
writes no header for them alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.data.messages import Conversation, Message

Span = tuple[int, int]
"""Index of the first character, and of the one after the last."""

OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
MARK = "\ufdd2"
"""A Unicode noncharacter that replaces a message's content."""


@dataclass
class Rendering:
    """A conversation and its tokenizer's template. control: names of control tokens, which its text cannot spell. name:
    of the tokenizer, as key=value."""

    tokenizer: PreTrainedTokenizerBase
    conversation: Conversation
    control: tuple[str, ...]
    name: str
    _texts: dict[tuple[int, bool], str] = field(default_factory=dict)

    def spans(self) -> tuple[str, list[Span]]:
        """The whole text, and its trained parts. Raises DataError if they cannot be found."""
        messages = self.conversation.messages
        whole = self._upto(len(messages))
        chosen = filter(self.conversation.trained, range(len(messages)))
        return whole, [
            self._of_answer(place, whole)
            if place and messages[place]["role"] == "assistant"
            else self.of_content(place, whole)
            for place in chosen
        ]

    def _of_answer(self, place: int, whole: str) -> Span:
        before, after = self._upto(place, prompt=True), self._upto(place + 1)
        if not whole.startswith(before):
            before = OPENED.sub("", before)
        if whole.startswith(before) and whole.startswith(after) and after.startswith(before):
            return len(before), len(after)
        ending = self._ending(place)
        end = whole.find(ending, len(before))
        # An answer that calls a tool may end with another token than one that does not.
        if ending and end >= 0 and whole.startswith(before) and after.endswith(ending):
            return len(before), end + len(ending)
        raise self._error(
            f"renders message {place + 1} differently when others follow, so the assistant's words cannot be separated"
            " from the rest; mark them with {% generation %} ... {% endgeneration %} in the template"
        )

    def of_content(self, place: int, whole: str) -> Span:
        """The content of a message and its end."""
        from jinja2 import TemplateError

        messages = self.conversation.messages
        head, mark, tail = self._render(self._with_mark(messages, place)).partition(MARK)
        try:
            *_, ending = self._render(self._with_mark(messages[: place + 1], place)).partition(MARK)
        # Some templates refuse a conversation that ends here; the end of the message then counts to the next one.
        except TemplateError:
            ending = ""
        fits = mark and whole.startswith(head) and whole.endswith(tail) and len(whole) >= len(head) + len(tail)
        if not fits or MARK in tail:
            remedy = "leave its role out of data.train_roles" if place else 'give it "weight": 0, or let the user begin'
            raise self._error(
                f"changes more than the words of message {place + 1}, so they cannot be separated from the rest;"
                f" {remedy}"
            )
        return len(head), len(whole) - len(tail) + (len(ending) if tail.startswith(ending) else 0)

    def _ending(self, place: int) -> str:
        """The text after the assistant's content, if it contains a control token that no text can spell."""
        said = {"role": "assistant", "content": MARK}
        *_, ending = self._render([*self.conversation.messages[:place], said]).partition(MARK)
        return ending if any(name in ending for name in self.control) else ""

    def _with_mark(self, messages: list[Message], place: int) -> list[Message]:
        content = messages[place].get("content")
        mark = [{"type": "text", "text": MARK}] if isinstance(content, list) else MARK
        return [{**message, "content": mark} if n == place else message for n, message in enumerate(messages)]

    def _upto(self, count: int, *, prompt: bool = False) -> str:
        if (count, prompt) not in self._texts:
            self._texts[count, prompt] = self._render(self.conversation.messages[:count], prompt=prompt)
        return self._texts[count, prompt]

    def _render(self, messages: list[Message], *, prompt: bool = False) -> str:
        options: Any = self.conversation.options
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
        assert isinstance(text, str)
        return text

    def _error(self, what: str) -> DataError:
        return DataError(f"data.paths: {self.conversation.where}: the chat template of {self.name} {what}")
