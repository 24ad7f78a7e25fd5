"""Compares the sliced loss with the loss of whole logits: bytes and CPU seconds of head, loss and gradients.

    python tests/benchmarks/chunked_loss.py                   one thread; the last line is JSON
    python tests/benchmarks/chunked_loss.py --tokens 8192     the time at full size too: 9 GB in float32

Both compute the cross-entropy of 16-bit or 32-bit logits without a float32 copy of all of them. Bytes are the peak of
live fake tensors minus the gradients that remain, for 8,192 tokens and a vocabulary of 131,072.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.axes.tensor.vocabulary import chunked_cross_entropy_sum
from trainer.estimate.tracker import Alive, Event, StorageTracker
from trainer.model.head import Sliced, slice_head

TOKENS, WORDS = 8192, 131072
MEMORY, TIME = 1 / 8, 1.1
"""Upper bounds on the ratios of bytes and seconds."""


class Model(nn.Module):
    """A model that consists of a head only."""

    def __init__(self, features: int, words: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(features, words, bias=False, dtype=dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def whole(model: Model, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return chunked_cross_entropy_sum(model.head(hidden), labels)


def in_slices(model: Model, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    words = model.head.out_features
    return model.head(hidden, sliced=Sliced(targets=labels, loss=chunked_cross_entropy_sum, entries=words, finish=None))


WAYS = {"whole logits": whole, "slices": in_slices}
Way = Callable[[Model, torch.Tensor, torch.Tensor], torch.Tensor]


def peak(way: Way, features: int, dtype: torch.dtype) -> int:
    """Peak bytes at full size, without the gradients that remain."""
    alive, most = Alive(), 0

    def count(event: Event) -> None:
        nonlocal most
        alive.count(event)
        most = max(most, alive.total)

    with FakeTensorMode():
        model, (hidden, labels) = Model(features, WORDS, dtype), inputs(TOKENS, features, dtype)
        slice_head(model)
        with StorageTracker(on_event=count):
            way(model, hidden, labels).backward()
    kept = (WORDS + TOKENS) * features * dtype.itemsize
    return most - kept


def inputs(tokens: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(tokens)[None] % 1000
    return torch.randn(1, tokens, features, dtype=dtype, requires_grad=True), labels


def seconds(features: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way. The ways alternate.

    They compute in float32 because the speed of bfloat16 matmuls varies widely between CPUs.
    """
    model, (hidden, labels) = Model(features, WORDS, torch.float32), inputs(tokens, features, torch.float32)
    slice_head(model)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, way in WAYS.items():
            begin = time.process_time()
            way(model, hidden, labels).backward()
            found[name].append(time.process_time() - begin)
            model.head.weight.grad = hidden.grad = None
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the time")
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        bytes_of = {name: peak(way, arguments.features, dtype) for name, way in WAYS.items()}
        ratio = bytes_of["slices"] / bytes_of["whole logits"]
        report[f"memory {dtype}".replace("torch.", "")] = round(ratio, 3)
        shown = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in bytes_of.items())
        print(f"memory, {dtype}: {shown}, ratio {ratio:.3f} (at most {MEMORY})")
    times = seconds(arguments.features, arguments.tokens, arguments.rounds)
    ratio = times["slices"] / times["whole logits"]
    report["time"] = round(ratio, 3)
    shown = ", ".join(f"{name} {time:.2f} s" for name, time in times.items())
    print(f"time, {arguments.tokens} tokens: {shown}, ratio {ratio:.2f} (at most {TIME})")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
