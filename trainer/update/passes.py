"""How often a step runs the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Of one micro-batch in one step."""

    forwards: int = 1
    backwards: int = 1
