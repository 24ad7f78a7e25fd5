"""Bugs of real trainers, planted into ours on request. The parity tests must detect each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from tests.support.cases import Trained, train
from trainer.axes.pipeline.run import PipelineRun
from trainer.axes.tensor import vocabulary
from trainer.axes.tensor.apply import TensorParallel
from trainer.data import IGNORED
from trainer.engine.torch import TorchEngine
from trainer.linear.values import TunedWeights
from trainer.moe import balancing
from trainer.moe.balancing import Balancing
from trainer.moe.seen import micro_batch
from trainer.optim import ema


def train_with(bug: str, overrides: list[str]) -> Trained:
    """Like `train`, with one bug planted."""
    with BUGS[bug]():
        return train(overrides)


@contextmanager
def skipped_all_reduce() -> Iterator[None]:
    """Replicas keep their own gradients."""
    with patch.object(TorchEngine, "_synchronise", lambda self, *, last: self.ddp.no_sync()):
        yield


@contextmanager
def mean_of_means() -> Iterator[None]:
    """Each micro-batch is divided by its own number of valid tokens."""

    def accumulate(self: Any, micro_batches: Any, valid_tokens: Any, factor: float) -> torch.Tensor:
        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            valid = int((labels != IGNORED).sum())
            return right(logits, labels) * _step_tokens(valid) / max(1, valid)

        right = self.objective.loss
        with patch.object(self.objective, "loss", loss):
            return original(self, micro_batches, valid_tokens, factor)

    original = TorchEngine._accumulate
    with patch.object(TorchEngine, "_accumulate", accumulate):
        yield


def _step_tokens(valid: int) -> float:
    """Valid tokens of each micro-batch if the step's tokens were spread evenly."""
    count = torch.tensor(float(valid))
    dist.all_reduce(count)
    return count.item() / dist.get_world_size()


@contextmanager
def last_micro_batch_only() -> Iterator[None]:
    """The gradient of all micro-batches but the last is lost."""

    def accumulate(self: Any, micro_batches: Any, valid_tokens: Any, factor: float) -> torch.Tensor:
        total = original(self, micro_batches[:-1], valid_tokens, factor)
        self.optimizer.zero_grad(set_to_none=False)
        return total + original(self, micro_batches[-1:], valid_tokens, factor)

    original = TorchEngine._accumulate
    with patch.object(TorchEngine, "_accumulate", accumulate):
        yield


@contextmanager
def partial_gradients_not_summed() -> Iterator[None]:
    """Query and key norms get gradients from the heads of one tensor-parallel rank only.

    The start-up check, which detects this too, is turned off.
    """
    with (
        patch.object(TensorParallel, "reduce_partial_gradients", lambda self, model: None),
        patch("trainer.passes.self_check", lambda *args, **kwargs: None),
    ):
        yield


@contextmanager
def scales_of_the_first_rank() -> Iterator[None]:
    """Each rank dequantizes its 4-bit codes with the first rank's scales."""

    def first(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
        (placement,) = like.placements
        assert isinstance(placement, Shard)
        return whole.chunk(like.device_mesh.size(), placement.dim)[0]

    with patch("trainer.linear.four_bit_layers.local_share", first):
        yield


@contextmanager
def tied_gradients_not_summed() -> Iterator[None]:
    """The tied embedding on the first stage and the head on the last stage diverge."""
    with patch.object(PipelineRun, "sum_tied_gradients", lambda self: None):
        yield


@contextmanager
def local_norm() -> Iterator[None]:
    """Each rank clips by the norm of its local shards."""

    def norm(gradients: Any, *, mesh: Any, device: Any) -> float:
        from trainer.axes.gradients import local

        return torch.stack([local(g).double().square().sum() for g in gradients]).sum().sqrt().item()

    with patch("trainer.axes.gradients.global_norm", norm):
        yield


@contextmanager
def load_of_each_rank() -> Iterator[None]:
    """Each rank balances by its own token counts only."""

    def finish(self: Balancing, rank: int) -> torch.Tensor:
        own = self.counts.double()
        share = original(self, rank)
        self.counts = own
        return share

    original = Balancing.finish
    with patch.object(Balancing, "finish", finish):
        yield


@contextmanager
def padding_counted_as_load() -> Iterator[None]:
    with patch.object(balancing, "micro_batch", lambda inputs, lengths, **more: micro_batch(inputs, None, **more)):
        yield


@contextmanager
def recompute_counted_twice() -> Iterator[None]:
    """A layer recomputed in the backward counts its tokens twice."""
    with patch("trainer.moe.balancing.recomputing", lambda: False):
        yield


@contextmanager
def expert_gradients_not_averaged() -> Iterator[None]:
    """Gradients of experts are summed over the ranks that send them tokens: they are ep times too large."""
    with patch("trainer.engine.torch.average_gradients", lambda *args, **kwargs: None):
        yield


@contextmanager
def expert_shards_swapped() -> Iterator[None]:
    """Each rank holds its experts in another order than the router numbers them."""
    from trainer.model import layers

    def swapped(whole: torch.Tensor, like: Any) -> torch.Tensor:
        share = original(whole, like)
        return share.flip(0) if share.ndim == 3 else share

    original = layers.local_share
    with patch.object(layers, "local_share", swapped):
        yield


@contextmanager
def adapters_drawn_by_each_rank() -> Iterator[None]:
    """Initial adapter values depend on the rank that draws them."""

    def generator(self: TunedWeights, name: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(dist.get_rank())

    with patch.object(TunedWeights, "_generator", generator):
        yield


@contextmanager
def smoothed_over_own_words() -> Iterator[None]:
    """Each rank spreads labels over its part of the vocabulary."""
    right = vocabulary.Weights.of
    with patch.object(vocabulary.Weights, "of", lambda smoothing, entries: right(smoothing, -(-entries // 2))):
        yield


@contextmanager
def averaged_on_the_first_rank() -> Iterator[None]:
    """The other ranks use the unaveraged weights, as if only one rank had to save."""
    follow = ema.follow
    with patch.object(ema, "follow", lambda built, decay: follow(built, 0.0 if dist.get_rank() else decay)):
        yield


BUGS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "skipped_all_reduce": skipped_all_reduce,
    "mean_of_means": mean_of_means,
    "last_micro_batch_only": last_micro_batch_only,
    "partial_gradients_not_summed": partial_gradients_not_summed,
    "scales_of_the_first_rank": scales_of_the_first_rank,
    "tied_gradients_not_summed": tied_gradients_not_summed,
    "local_norm": local_norm,
    "load_of_each_rank": load_of_each_rank,
    "padding_counted_as_load": padding_counted_as_load,
    "recompute_counted_twice": recompute_counted_twice,
    "expert_gradients_not_averaged": expert_gradients_not_averaged,
    "expert_shards_swapped": expert_shards_swapped,
    "adapters_drawn_by_each_rank": adapters_drawn_by_each_rank,
    "smoothed_over_own_words": smoothed_over_own_words,
    "averaged_on_the_first_rank": averaged_on_the_first_rank,
}
