"""Problems of the keys that say how conversations are read, as `make_plan` reports them."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import ChatFormat
from configs.schema_data import Data
from trainer.data.formats import FORMATS
from trainer.data.formats.common import MESSAGE_FIELDS, ROW_FIELDS
from trainer.data.messages import ROLES

OF_MESSAGES = (ChatFormat.messages, ChatFormat.sharegpt)
RENAMED = (*dict.fromkeys(name for form in FORMATS.values() for name in form.FIELDS), *ROW_FIELDS, *MESSAGE_FIELDS)


def check_reading(data: Data) -> Iterator[str]:
    for name in data.fields:
        if name not in RENAMED:
            where = "data.messages_key names it" if name == "messages" else f"use one of {', '.join(RENAMED)}"
            yield f"data.fields.{name}={data.fields[name]}: is no field that is read here; {where}"
    for theirs, role in data.roles.items():
        if role not in ROLES:
            yield f"data.roles.{theirs}={role}: is no role; use one of {', '.join(ROLES)}"
    if wrong := [role for role in data.train_roles if role not in ROLES]:
        yield f"data.train_roles={data.train_roles}: {wrong[0]} is no role; use one of {', '.join(ROLES)}"
    if data.messages_key is not None and data.chat_format not in (ChatFormat.auto, *OF_MESSAGES):
        yield (
            f"data.messages_key={data.messages_key}: data.chat_format={data.chat_format} has no list of messages;"
            " name its fields in data.fields, or leave it out"
        )
    if not data.train_roles:
        yield "data.train_roles=[]: nothing would be trained on; the default is [assistant]"
