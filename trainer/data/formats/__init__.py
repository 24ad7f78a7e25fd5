"""Common forms of conversations, one module each: from a row of a file to a list of messages.

    messages      {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    sharegpt      {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    alpaca        {"instruction": "Say Ho", "input": "", "output": "Ho"}
    completion    {"prompt": "Hi", "completion": "Ho"}          or with lists of messages

A module defines the rows of its form (`EXAMPLE`, `FIELDS`), whether a row has it (`recognises`), and its messages
(`convert`). `trainer.data.messages` handles tools, weights and all other fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, cast

from configs.errors import DataError
from trainer.data.formats import alpaca, completion, messages, sharegpt
from trainer.data.formats.common import Reading, renamed
from trainer.data.rows import names_of


class Format(Protocol):
    """A module of this package.

    EXAMPLE: a row, as JSON. FIELDS: the fields that it reads, which `data.fields` may rename.
    """

    EXAMPLE: str
    FIELDS: tuple[str, ...]

    def recognises(self, row: dict[str, Any], reading: Reading) -> bool: ...

    def convert(self, row: dict[str, Any], reading: Reading, *, what: str) -> dict[str, Any]:
        """The row with a list of `messages` instead of the form's fields. what: the place of the row, for errors.
        Raises DataError for a broken row of this form."""
        ...


FORMATS: Mapping[str, Format] = MappingProxyType(
    cast(
        "dict[str, Format]",
        {"messages": messages, "sharegpt": sharegpt, "alpaca": alpaca, "completion": completion},
    )
)
PREFERENCES = ("chosen", "rejected")


def to_messages(row: dict[str, Any], reading: Reading, *, where: str) -> tuple[str, dict[str, Any]]:
    """The form of the row, and the row with its `messages`. Raises DataError, with `where`, for a row of no form, or of
    several."""
    row, what = renamed(row, reading), f"data.paths: {where}"
    names = [name for name, form in FORMATS.items() if form.recognises(row, reading)]
    if reading.form is not None:
        if reading.form not in names:
            example = FORMATS[reading.form].EXAMPLE
            raise DataError(
                f"data.chat_format={reading.form}: {where} has the fields {names_of(row)}; write {example}, or name the"
                " fields in data.fields"
            )
        names = [reading.form]
    if len(names) > 1:
        raise DataError(f"{what} could be read as {' or as '.join(names)}; set data.chat_format={names[0]} or another")
    if not names:
        _refuse(row, reading, where=where)
    return names[0], FORMATS[names[0]].convert(row, reading, what=what)


def _refuse(row: dict[str, Any], reading: Reading, *, where: str) -> None:
    if reading.key is not None or any(name in row for name in messages.KEYS):
        messages.refuse(row, reading, where=where)
    if any(name in row for name in PREFERENCES):
        raise DataError(
            f"data.paths: {where}: preferences (chosen, rejected) are not trained on here; give conversations"
        )
    raise DataError(
        f"data.paths: {where} has the fields {names_of(row)}, which are no conversation of a known form"
        f" ({', '.join(FORMATS)}); name its fields in data.fields or data.messages_key"
    )
