"""A list of turns with `from` and `value`, as people shared their chats.

{"conversations": [{"from": "human", "value": "2 + 2?"},
                   {"from": "function_call", "value": "{\\"name\\": \\"add\\", \\"arguments\\": {...}}"},
                   {"from": "observation", "value": "4"},
                   {"from": "gpt", "value": "It is 4."}],
 "system": "Be brief.", "tools": "[...]"}
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import Any

from configs.errors import DataError, first_line
from trainer.data.formats.common import Reading, listed
from trainer.data.formats.messages import holds_list, taken

EXAMPLE = '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'
FIELDS = ()
CALL = "function_call"
ROLES = MappingProxyType(
    {
        "system": "system",
        **dict.fromkeys(("human", "user"), "user"),
        **dict.fromkeys(("gpt", "assistant", "bard", "bing", "chatgpt", CALL), "assistant"),
        **dict.fromkeys(("observation", "tool", "function"), "tool"),
    }
)


def recognises(row: dict[str, Any], reading: Reading) -> bool:
    # Who names the field of the speaker reads messages.
    return "role" not in reading.fields and holds_list(row, reading, field="from")


def convert(row: dict[str, Any], reading: Reading, *, what: str) -> dict[str, Any]:
    turns, left = taken(row, reading, what=what)
    messages = [_message(turn, reading, what=f"{what}: message {place}") for place, turn in enumerate(turns, start=1)]
    if isinstance(tools := listed(left.get("tools"), what=f"{what}: tools"), list):
        # In this form a tool is often its function alone; a template reads what an API is given.
        left["tools"] = [_tool(tool) for tool in tools]
    return {**left, "messages": messages}


def _message(turn: Any, reading: Reading, *, what: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise DataError(f'{what} is not an object with "from" and "value"; mend or remove the line')
    speaker, value = turn["from"], turn["value"]
    role = reading.roles.get(speaker, ROLES.get(speaker)) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(dict.fromkeys([*ROLES, *reading.roles]))
        raise DataError(f"{what} is from {speaker!r}; use one of {known}, or say in data.roles who that is")
    others = {name: each for name, each in turn.items() if name not in ("from", "value")}
    if speaker == CALL and CALL not in reading.roles:
        return {"role": role, "content": None, "tool_calls": _calls(value, what=what), **others}
    return {"role": role, "content": value, **others}


def _calls(value: Any, *, what: str) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: its {CALL} is no JSON ({first_line(error)}); mend or remove the line") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise DataError(f'{what}: its {CALL} is no object with "name" and "arguments"; mend or remove the line')
    return [{"type": "function", "function": call} for call in calls]


def _tool(tool: Any) -> Any:
    bare = isinstance(tool, dict) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool
