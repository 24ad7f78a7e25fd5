"""Imported once by the harness's fork server. Otherwise DeepSpeed and its lazy imports cost each rank seconds."""

from __future__ import annotations

from importlib import import_module

from tests.support.kernels import load_complete_ones
from trainer.engine.deepspeed.setup import import_deepspeed

import_deepspeed("cpu")
for module in (
    "runtime.bf16_optimizer",
    "runtime.zero.stage3",
    "runtime.zero.muon.muon_optimizer",
    "comm.mori",
    "module_inject.auto_ep_layer",
    "runtime.superoffload.superoffload_stage3",
):
    import_module(f"deepspeed.{module}")
import_module("trainer.engine.deepspeed.engine")
load_complete_ones()
