"""Where adapters can be trained: each rule yields one line with key, value, rule and remedy. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import EngineName, TuningMethod
from configs.schema import Config


def check_tuning(config: Config) -> Iterator[str]:
    """All problems of the group `tuning`, and of other groups beside it."""
    tuning, parallel = config.tuning, config.parallel
    if tuning.rank < 1:
        yield f"tuning.rank={tuning.rank}: must be 1 or more"
    if not tuning.alpha > 0:
        yield f"tuning.alpha={tuning.alpha}: must be greater than 0"
    if not 0 <= tuning.dropout < 1:
        yield f"tuning.dropout={tuning.dropout}: must be at least 0 and less than 1"
    if tuning.method is TuningMethod.full:
        if tuning.target_modules:
            yield (
                f"tuning.target_modules={tuning.target_modules}: is for adapters, this is tuning=full; choose"
                " tuning=lora, or leave it out"
            )
        return
    if parallel.engine is EngineName.deepspeed:
        yield f"tuning={tuning.method}: trains adapters under engine torch; use parallel=fsdp, which shards as ZeRO 3"
    if parallel.tp > 1:
        yield (
            f"parallel.tp={parallel.tp}: cuts matrices that tuning={tuning.method} puts adapters beside, and has no"
            " plan for these; use parallel=fsdp or pipeline, or tuning=full"
        )
    if config.train.compile:
        yield "train.compile=true: compiles no layers with adapters; set it to false, or use tuning=full"
    if config.estimate.search:
        yield "estimate.search=true: its cost model is of full training; name a layout, or use tuning=full"
