"""An instruction and its answer, with optional input and history.

    {"instruction": "Add", "input": "2 2", "output": "4",
     "system": "Be brief.", "history": [["Say a number", "2"]]}

The instruction and, on a new line, the input are the user's message.
"""

from __future__ import annotations

from typing import Any

from configs.errors import DataError
from trainer.data.formats.common import Reading, listed, text_at

EXAMPLE = '{"instruction": ..., "input": ..., "output": ...}'
FIELDS = ("instruction", "input", "output", "history")


def recognises(row: dict[str, Any], reading: Reading) -> bool:
    return "instruction" in row and "output" in row


def convert(row: dict[str, Any], reading: Reading, *, what: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for pair in listed(row.get("history"), what=f"{what}: history") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"{what}: history is no list of pairs of text, [[question, answer], ...]; mend the line")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = [text_at(row, name, what=what) for name in ("instruction", "input")]
    answer = text_at(row, "output", what=what)
    if not any(question) or not answer:
        which = "output" if any(question) else "instruction"
        raise DataError(f'{what}: "{which}" is empty; mend or remove the line')
    messages += [
        {"role": "user", "content": "\n".join(text for text in question if text)},
        {"role": "assistant", "content": answer},
    ]
    return {**{name: value for name, value in row.items() if name not in FIELDS}, "messages": messages}
