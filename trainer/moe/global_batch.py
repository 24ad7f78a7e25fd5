"""The balancing loss over whole steps (Qiu et al. 2025, arXiv:2501.11873), by the load of the step before.

    of one layer    experts / k * sum over experts of  f * P       f: mean over the tokens of the step before
    of the step     sum over layers                                P: mean over the tokens of this step

Divided by k, a layer's value at even routing is 1, and so is it in the first step, which has no step before. Sequences
may differ as they like: only the load of all of them together is drawn to even.

The load of this very step is known after its last forward, and the backward of its first micro-batch runs before that:
whoever wants it in f must run every micro-batch twice, or settles for counts that grow from one micro-batch to the next
(Qiu et al., Megatron) and so for a loss that depends on how the step is cut. The load of the step before is known, is
equal under every layout, and costs one all-reduce of layers * experts numbers a step. It is part of a checkpoint.
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
    # Experts times the part of all routes that went to each: 1 where they are even.
    even = (seen.experts * load / routed.clamp(min=1)).where(routed > 0, 1.0)
    found = even / step.tokens
    return lambda: found
