"""Imported once by the fork server of `tests.gpu.all`: what every case would import, without touching CUDA.

A process that has a CUDA context, or has so much as asked the runtime for its devices, cannot be forked. Should a
library begin to do so, `tests.gpu.all` notices it in its first case and takes a lower level.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module

from tests.gpu.child import LEVEL

LIBRARIES = ("torch", "torch.distributed", "torch.distributed.tensor", "transformers", "accelerate")
LIBRARIES += ("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2")
LIBRARIES += (
    "trainer.run.loop",
    "trainer.engine.torch",
    "trainer.estimate.estimate",
    "trainer.estimate.trace",
    "tests.support.parity",
)
LIBRARIES += ("tests.gpu.run", "tests.gpu.fake_rank", "torch.testing._internal.distributed.fake_pg")


def preload(level: str) -> None:
    """As far as it goes: a case that needs what is missing says so itself."""
    if level == "nothing":
        return
    for name in LIBRARIES:
        _try(lambda name=name: import_module(name))
    if level == "all":
        _try(_deepspeed)


def _deepspeed() -> None:
    from trainer.engine.deepspeed.setup import import_deepspeed

    import_deepspeed(os.environ["TESTS_GPU_DEVICE"])
    import_module("deepspeed.runtime.zero.stage3")
    import_module("trainer.engine.deepspeed.engine")


def _try(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        print(f"not preloaded: {type(error).__name__}: {error}", flush=True)


preload(os.environ[LEVEL])
