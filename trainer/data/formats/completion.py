"""A prompt and its completion, each as text or as a list of messages.

    {"prompt": "2 + 2?", "completion": "4"}
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]}

Texts become the user's and the assistant's message. No part of a prompt is trained on, even the assistant's messages in
it.
"""

from __future__ import annotations

from typing import Any

from configs.errors import DataError
from trainer.data.formats import messages
from trainer.data.formats.common import FLAGS, Reading, listed

EXAMPLE = '{"prompt": ..., "completion": ...}'
FIELDS = ("prompt", "completion")


def recognises(row: dict[str, Any], reading: Reading) -> bool:
    return all(name in row for name in FIELDS)


def convert(row: dict[str, Any], reading: Reading, *, what: str) -> dict[str, Any]:
    prompt, completion = (listed_messages(row[name], what=f"{what}: {name}") for name in FIELDS)
    if isinstance(prompt, str) is not isinstance(completion, str):
        raise DataError(f"{what}: of prompt and completion one is text and one is messages; mend or remove the line")
    left = {name: value for name, value in row.items() if name not in FIELDS}
    if isinstance(prompt, str):
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return {**left, "messages": said}
    before, after = (
        messages.convert({"messages": part}, Reading(fields=reading.fields, roles=reading.roles), what=what)["messages"]
        for part in (prompt, completion)
    )
    return {**left, "messages": [*map(_given, before), *after]}


def _given(message: Any) -> Any:
    says = isinstance(message, dict) and not message.keys() & {"weight", *FLAGS}
    return {**message, "weight": 0} if says else message


def listed_messages(value: Any, *, what: str) -> str | list[Any]:
    # A text prompt may begin with a bracket: it is JSON only if it contains the speaker's field.
    is_messages = isinstance(value, str) and value.lstrip().startswith("[{") and '"role"' in value
    found = listed(value, what=what) if is_messages else value
    if not isinstance(found, str | list) or not found:
        raise DataError(f"{what} is {'empty' if not found else type(found).__name__}; write text or messages")
    return found
