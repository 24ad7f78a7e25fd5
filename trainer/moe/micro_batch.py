"""The balancing loss as transformers defines it (Fedus et al. 2022, arXiv:2101.03961, equations 4 to 6).

    of one micro-batch    experts * sum over experts of  f * P        f, P: means over all tokens of all layers
    of the step           mean over its micro-batches

f counts each of a token's top-k experts as one, so the value at even routing is k. Layers are pooled: one layer may
favour an expert that another one neglects. The loss is a product of two means over one micro-batch, so layouts that
split a step into the same micro-batches have the same loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from configs.schema import Config
from trainer.axes import CONTEXT, PIPELINE

if TYPE_CHECKING:
    import torch

    from trainer.moe.seen import Seen, Step

PER_LAYER = False


def problems(config: Config) -> Iterator[str]:
    cut = ((PIPELINE, "gives each rank some of the layers"), (CONTEXT, "gives each rank a part of the sequences"))
    for axis, reason in cut:
        if (degree := getattr(config.parallel, axis)) > 1:
            yield (
                f"moe.balance=micro_batch: is a mean over all layers and tokens of a micro-batch, and"
                f" parallel.{axis}={degree} {reason}; use moe.balance=global_batch or sequence"
            )


def weights(seen: Seen, step: Step) -> Callable[[], torch.Tensor]:
    import torch

    shared = seen.micro_batch
    # Tensor-parallel ranks may see a part of each sequence.
    whole = step.whole_sequences(torch.cat([seen.counts, seen.lengths[:, None]], dim=1).sum(dim=0, keepdim=True))
    shared["counts"] = shared.get("counts", 0) + whole[:, :-1]
    shared["rows"] = shared.get("rows", 0) + whole[:, -1].sum()

    def after_the_forward() -> torch.Tensor:
        rows = shared["rows"].clamp(min=1).to(seen.sums.dtype)
        return seen.experts * shared["counts"] / rows.square() / step.micro_batches

    return after_the_forward
