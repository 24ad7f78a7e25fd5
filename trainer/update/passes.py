"""How often a step runs the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Of one micro-batch in one step."""

    forwards: int = 1
    backwards: int = 1

    @property
    def useful(self) -> float:
        """Of the FLOPs of one forward and backward. What is run again, as for a recompute, counts once."""
        return 1.0 if self.backwards else self.forwards / 3
