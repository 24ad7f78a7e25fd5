"""Imported last by the harness's fork server: what each rank else imports to read a configuration or build a model."""

from __future__ import annotations

import contextlib
import gc
from importlib import import_module

from configs.errors import EnvironmentProblem
from configs.load import load_config
from trainer.linear import float8

for model in ("gemma2", "gpt2", "llama", "mixtral", "qwen3"):
    import_module(f"transformers.models.{model}.modeling_{model}")
for module in ("generation.utils", "processing_utils", "convert_slow_tokenizer", "tokenization_utils_tokenizers"):
    import_module(f"transformers.{module}")
for module in ("checkpoint.manager", "data.build", "estimate.tracker", "run.loop"):
    import_module(f"trainer.{module}")
for module in ("peft.tuners.lora.bnb", "bitsandbytes", "torch.profiler._cupti_monitor"):  # not installed everywhere
    with contextlib.suppress(ImportError):
        import_module(module)
with contextlib.suppress(EnvironmentProblem):
    float8.layers()
# Hydra looks for its plugins once per process, and its parser learns with what it reads.
load_config(["model=tiny", "parallel.pipeline.split=[1,3]", "optimizer.lr=3e-3", "data.ignore_fraction=0.6"])
# A collection in a rank would go through all of this, and copy each page that it writes to: a quarter of a rank's time.
gc.collect()
gc.freeze()
