"""Messages of a mesh axis inside a layer: each axis' module states them, the planner times them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWork:
    """One layer's micro-batch on a rank.

    tokens: number of tokens on the rank.
    hidden, attention, key_value: bytes per token of the hidden state, of the queries, of the keys.
    experts, chosen: number of routed experts in the layer, and per token; 0 in a dense model.
    forwards: forward passes over the layer in a step: 2 if it is recomputed, wholly or (`partly`) not.
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
    """How many times a layer performs one collective, forward and backward, and its bytes, as `search.network`
    counts."""

    how: Literal["all_reduce", "gather", "all_to_all"]
    size_bytes: float
    times: int
