"""The balancing loss of each sequence (DeepSeek-V3, arXiv:2412.19437, equations 17 to 20).

    of one sequence and layer    experts / k * sum over experts of  f * P       f, P: means over the sequence's tokens
    of the step                  sum over layers of the mean over its sequences

Divided by k, a layer's value at even routing is 1. A sequence is a row of the batch without its padding, whichever
documents are packed into it. It belongs to one micro-batch, so the loss is equal under every layout.

Communication: ranks that hold parts of the same sequences (context parallel) add up their counts, sequences * (experts
+ 1) numbers per layer and micro-batch.
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
    import torch

    whole = step.whole_sequences(torch.cat([seen.counts, seen.lengths[:, None]], dim=1))
    counts, lengths = whole[:, :-1], whole[:, -1:].clamp(min=1).to(seen.sums.dtype)
    found = (seen.experts / seen.top_k / step.sequences) * counts / lengths.square()
    return lambda: found
