"""The balancing loss over whole steps (Qiu et al. 2025, arXiv:2501.11873), by the load of the previous step.

    of one layer    experts / k * sum over experts of  f * P       f: mean over the tokens of the step before
    of the step     sum over layers                                P: mean over the tokens of this step

Divided by k, a layer's value at even routing is 1, also in the first step, which has no previous one. Single sequences
may be uneven: only their total load is balanced.

The load of the current step is known after its last forward, but the backward of its first micro-batch runs earlier.
Using it in f would mean to run every micro-batch twice, or to let counts grow from one micro-batch to the next (Qiu et
al., Megatron), with a loss that depends on how the step is split. The previous step's load is known, is equal under
every layout, and costs one all-reduce of layers * experts numbers per step. It is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from configs.schema import Config

if TYPE_CHECKING:
    import torch

    from trainer.moe.seen import Seen, Step

PER_LAYER = True


def problems(config: Config) -> Iterator[str]:
    yield from ()


def weights(seen: Seen, step: Step) -> Callable[[], torch.Tensor]:
    load = step.load[seen.layer : seen.layer + 1, : seen.experts].to(seen.sums.dtype)
    routed = load.sum()
    # Number of experts times the share of all routes to each: 1 if they are even.
    even = (seen.experts * load / routed.clamp(min=1)).where(routed > 0, 1.0)
    found = even / step.tokens
    return lambda: found
