"""How often a step runs the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Of one micro-batch in one step."""

    forwards: int = 1
    backwards: int = 1

    def useful(self, forward: float, backward: float) -> float:
        """What counts of the FLOPs of a forward and of a backward. What is run again, as for a recompute, counts
        once."""
        return forward + backward if self.backwards else self.forwards * forward
