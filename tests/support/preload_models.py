"""Imported last by the harness's fork server: the imports that reading a config and building a model need."""

from __future__ import annotations

import contextlib
import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from configs.errors import EnvironmentProblem
from configs.load import load_config
from tests.support.sixteen_bits import replace_matmuls
from trainer.linear import float8

replace_matmuls()

for model in ("gemma2", "gpt2", "llama", "mixtral", "qwen3"):
    import_module(f"transformers.models.{model}.modeling_{model}")
for module in ("generation.utils", "processing_utils", "convert_slow_tokenizer", "tokenization_utils_tokenizers"):
    import_module(f"transformers.{module}")
for module in ("checkpoint.manager", "data.build", "estimate.tracker", "run.loop"):
    import_module(f"trainer.{module}")
for module in ("peft.tuners.lora.bnb", "bitsandbytes", "torch.profiler._cupti_monitor"):  # may be missing
    with contextlib.suppress(ImportError):
        import_module(module)
with contextlib.suppress(EnvironmentProblem):
    float8.layers()
# transformers compiles a thousand patterns when it first asks how a model's folder names its tensors.
get_checkpoint_conversion_mapping("llama")
# Hydra searches for plugins once per process, and its parser fills its caches as it parses.
load_config(["model=tiny", "parallel.pipeline.split=[1,3]", "optimizer.lr=3e-3", "data.ignore_fraction=0.6"])
# A collection in a rank would visit all these objects and copy each page it writes: a quarter of a rank's time.
gc.collect()
gc.freeze()
