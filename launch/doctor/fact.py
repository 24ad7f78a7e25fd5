"""One line of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """name: what was looked at. text: what was found; where it is not `well`, with its remedy."""

    name: str
    text: str
    well: bool = True
