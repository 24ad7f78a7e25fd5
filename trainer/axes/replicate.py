"""Copies of the model, the axis `dp_replicate`: `ddp` averages their gradients, or FSDP2 if they are sharded."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName
from configs.schema import Config
from trainer.plan.views import DENSE, EXPERT, Axis

AXIS = Axis(name="dp_replicate", text="{} replicas", views=(DENSE, EXPERT), reads=True, copies=True)


def problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.engine is EngineName.deepspeed and parallel.dp_replicate != 1:
        yield f"parallel.dp_replicate={parallel.dp_replicate}: ZeRO partitions over all ranks; set it to 1"
