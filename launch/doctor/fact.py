"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """name: subject. text: finding; if it is not `well`, the text includes the remedy."""

    name: str
    text: str
    well: bool = True
