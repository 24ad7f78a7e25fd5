"""What keys of other trainers are called here: `foreign.yaml` holds the names, this module looks them up."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml


@cache
def foreign_names() -> dict[str, str]:
    """The table as it is written: {"learning_rate": "optimizer.lr", ...}."""
    return yaml.safe_load((files("configs") / "foreign.yaml").read_text(encoding="utf-8"))


def answer(key: str) -> str | None:
    """How a key of another trainer is spelt here, or None. The whole key is looked up first, then its last part."""
    names = foreign_names()
    key = key.replace("-", "_")
    found = names.get(key) or names.get(key.rpartition(".")[2])
    if found is None:
        return None
    spelling, _, note = found.partition("; ")
    return f"{spelling} ({note})" if note else spelling
