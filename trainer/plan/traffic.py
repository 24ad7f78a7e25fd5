"""What the ranks of a mesh axis send each other inside of a layer: each axis' module says it, the planner times it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """One layer's micro-batch on a rank.

    tokens: that the rank has.
    hidden, attention, key_value: bytes of one token's hidden state, of its queries, of its keys.
    experts, chosen: routed experts of the layer, and how many of them a token goes to; 0 in a dense model.
    forwards: passes over the layer forward in a step: 2 where it is computed again, wholly or (`partly`) not.
    """

    tokens: float
    hidden: float
    attention: float
    key_value: float
    experts: int
    chosen: int
    forwards: int
    partly: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """How often a layer does one collective, forward and backward, and its bytes, as `search.network` counts them."""

    how: Literal["all_reduce", "gather", "all_to_all"]
    size_bytes: float
    times: int
