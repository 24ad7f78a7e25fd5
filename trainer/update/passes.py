"""How many times a step runs the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Passes over one micro-batch in one step."""

    forwards: int = 1
    backwards: int = 1

    def useful(self, forward: float, backward: float) -> float:
        """Passes that count as FLOPs of a forward and of a backward. Repeated passes, such as a recompute, count
        once."""
        return forward + backward if self.backwards else self.forwards * forward
