"""Content in parts, [{"type": "text", "text": ...}, ...], for templates with and without support for it.

A template that treats content as text prints a list in Python's notation, brackets and all; one that loops over parts
breaks a text into characters. Each template is probed once, with a message of parts and with one of text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = ("qpartone", "qparttwo")


class Contents:
    """Contents that a template writes. text, parts: whether it writes content as text, and as parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.text = "".join(TEXTS) in _render(tokenizer, template, "".join(TEXTS))
        parts = _render(tokenizer, template, [{"type": "text", "text": text} for text in TEXTS])
        self.parts = all(text in parts for text in TEXTS) and "{'type'" not in parts and '"type"' not in parts

    def written(self, content: Any) -> Any:
        """The content unchanged if the template supports it, else in the other form."""
        if isinstance(content, list) and not self.parts:
            return "".join(part["text"] for part in content)
        if isinstance(content, str) and self.parts and not self.text:
            return [{"type": "text", "text": content}]
        return content


def _render(tokenizer: Any, template: str, content: Any) -> str:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    # A template is a program: it can fail in any way, and then it fails on the conversations, in one line.
    except Exception:
        return ""
