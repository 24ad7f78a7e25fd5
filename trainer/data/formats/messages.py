"""A list of messages with `role` and `content`, as in APIs and `apply_chat_template`.

{"messages": [{"role": "user", "content": "2 + 2?"},
              {"role": "assistant", "content": [{"type": "text", "text": "4"}], "weight": 0}],
 "tools": [...]}
"""

from __future__ import annotations

from typing import Any

from configs.errors import DataError
from trainer.data.formats.common import MESSAGE_FIELDS, Reading, listed
from trainer.data.rows import ABSENT, names_of, value_of

KEYS = ("messages", "conversations", "conversation")
"""Fields that may hold a list of messages, unless `data.messages_key` names one."""
EXAMPLE = '{"messages": [{"role": "user", "content": ...}, ...]}'
FIELDS = ()


def recognises(row: dict[str, Any], reading: Reading) -> bool:
    return holds_list(row, reading, field=reading.of_message("role"))


def convert(row: dict[str, Any], reading: Reading, *, what: str) -> dict[str, Any]:
    found, left = taken(row, reading, what=what)
    return {**left, "messages": [_message(message, reading) for message in found]}


def _message(message: Any, reading: Reading) -> Any:
    if not isinstance(message, dict):
        return message
    names = {reading.of_message(name): name for name in MESSAGE_FIELDS}
    made = {names.get(name, name): value for name, value in message.items()}
    if isinstance(role := made.get("role"), str):
        made["role"] = reading.roles.get(role, role)
    return made


def holds_list(row: dict[str, Any], reading: Reading, *, field: str) -> bool:
    """Whether a row has a list of messages whose first one names its speaker in `field`."""
    return any(_begins_with(value, field) for _, value in _lists(row, reading))


def taken(row: dict[str, Any], reading: Reading, *, what: str) -> tuple[list[Any], dict[str, Any]]:
    """The messages of a row, and its other fields: those next to the messages, and those of the row."""
    found = _lists(row, reading)
    if len(found) > 1:
        raise DataError(
            f"{what} has messages in {' and in '.join(name for name, _ in found)}; set data.messages_key to one"
        )
    ((name, _),) = found
    *outer, last = [name] if name in row else name.split(".")
    left = {key: value for key, value in row.items() if key != (outer or [last])[0]}
    inside: Any = row
    for part in outer:
        inside = inside[part]
        left |= {key: value for key, value in inside.items() if key not in outer}
    left.pop(last, None)
    return listed(inside[last], what=f"{what}: {name}"), left


def _lists(row: dict[str, Any], reading: Reading) -> list[tuple[str, Any]]:
    keys = KEYS if reading.key is None else (reading.key,)
    found = ((name, value_of(row, name)) for name in keys)
    return [(name, value) for name, value in found if value is not ABSENT and value not in (None, "")]


def _begins_with(value: Any, field: str) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[") and f'"{field}"' in value
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and field in value[0]


def refuse(row: dict[str, Any], reading: Reading, *, where: str) -> None:
    """Raise DataError for a row that has a field for messages, and no list of messages in it."""
    key = f"data.messages_key={reading.key}" if reading.key else "data.paths"
    if reading.key and value_of(row, reading.key) is ABSENT:
        raise DataError(f"{key}: {where} has no such field; it has {names_of(row)}")
    value = next((value for _, value in _lists(row, reading)), None)
    if isinstance(value, list) and value:
        raise DataError(
            f'{key}: {where}: message 1 is not an object with "role" and "content"; mend or remove the line'
        )
    raise DataError(f'{key}: {where} holds no list of messages there; write [{{"role": "user", "content": ...}}, ...]')
