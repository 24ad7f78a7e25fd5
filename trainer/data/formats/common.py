"""Shared by the forms of conversations: renamed fields and roles, and text in cells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.errors import DataError, first_line
from trainer.data.rows import ABSENT, value_of

Row = dict[str, Any]
MESSAGE_FIELDS = ("role", "content", "weight")
"""Fields of a message that `data.fields` may rename; all other names in it are fields of the row."""
ROW_FIELDS = ("system", "tools", "documents", "chat_template_kwargs")
"""Fields of a row that every form may have."""
FLAGS = ("loss", "train", "trainable", "training")
"""Fields of a message that other trainers use like `weight` here: true or 1, false or 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How rows are read: settings from the configuration.

    key: `data.messages_key`. form: `data.chat_format`, None if each row shows it. fields: `data.fields`, our name to
    theirs.
    roles: `data.roles`, theirs to ours. trained: `data.train_roles`. skip: `data.bad_rows`.
    """

    key: str | None = None
    form: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    trained: tuple[str, ...] = ("assistant",)
    skip: bool = False

    def identity(self) -> str:
        """Changes with everything that could change a conversation."""
        return repr((self.key, self.form, dict(self.fields), dict(self.roles), self.trained, self.skip))

    def of_message(self, name: str) -> str:
        """The name that a field of a message has in the file."""
        return self.fields.get(name, name)


def renamed(row: Row, reading: Reading) -> Row:
    """The row under our names, with nested fields moved to the top."""
    mine = {name: theirs for name, theirs in reading.fields.items() if name not in MESSAGE_FIELDS}
    found = {name: value for name, theirs in mine.items() if (value := value_of(row, theirs)) is not ABSENT}
    left = {name: value for name, value in row.items() if name not in mine.values()}
    return {**left, **found}


def listed(value: Any, *, what: str) -> Any:
    """The value, which a table's cell may hold as JSON text. what: the field and its place."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what} is no JSON ({first_line(error)}); mend the line") from None
    return value


def text_at(row: Row, name: str, *, what: str) -> str:
    """The text of a field; "" where it is null or absent."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f'{what}: "{name}" holds {type(value).__name__}, not text; mend the line')
    return value
