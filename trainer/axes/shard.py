"""Shards of the model, the axis `dp_shard`: `fsdp` does it, or DeepSpeed's ZeRO. It goes with everything."""

from __future__ import annotations

from collections.abc import Iterator

from configs.schema import Config
from trainer.plan.views import Axis

WORDS = "parameters, gradients and optimizer states sharded over {} (FSDP2)"
AXIS = Axis(name="dp_shard", words=WORDS, reads=True, shards=True)


def problems(config: Config) -> Iterator[str]:
    yield from ()
