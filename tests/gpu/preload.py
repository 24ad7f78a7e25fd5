"""Imported once by the fork server of `tests.gpu.all`: the imports of every case, without initializing CUDA.

A process cannot be forked after it has created a CUDA context, or has asked the CUDA runtime for its devices. If a
library starts to do so, the first case of `tests.gpu.all` fails, and a lower preload level is used.
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
    """Import as many libraries as possible. A case that needs a missing one reports this itself."""
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
