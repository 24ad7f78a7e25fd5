"""Pipeline parallel, the axis `pp`: which rank runs which layers, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName
from configs.schema import Config
from trainer.plan.views import DENSE, EXPERT, Axis

TEXT = "layers over {} pipeline ranks (which wait {bubble:.0%} of a step)"
AXIS = Axis(name="pp", text=TEXT, views=(DENSE, EXPERT))


def problems(config: Config) -> Iterator[str]:
    """`table.check_pipeline` checks the settings that need the batch."""
    parallel = config.parallel
    if parallel.engine is EngineName.deepspeed:
        if parallel.pp > 1:
            yield (
                f"parallel.pp={parallel.pp}: ZeRO 2 and 3 partition what a pipeline adds up over its micro-batches, so"
                " DeepSpeed forbids the pair; use parallel=3d_zero1 or pipeline_fsdp"
            )
    elif parallel.pp == 1 and (parallel.pipeline.split or parallel.pipeline.stages_per_rank):
        yield "parallel.pipeline: split and stages_per_rank need parallel.pp > 1; set pp, or take them away"
