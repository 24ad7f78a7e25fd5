"""Imported last by the harness's fork server: what each rank else imports to read a configuration or build a model."""

from __future__ import annotations

import gc
from importlib import import_module

from configs.load import load_config

for model in ("gpt2", "llama", "qwen3"):
    import_module(f"transformers.models.{model}.modeling_{model}")
for module in ("generation.utils", "processing_utils", "convert_slow_tokenizer", "tokenization_utils_tokenizers"):
    import_module(f"transformers.{module}")
for module in ("checkpoint.keeper", "data.build", "loop"):
    import_module(f"trainer.{module}")
# Hydra looks for its plugins once per process.
load_config(["model=tiny"])
# A collection in a rank would go through all of this, and copy each page that it writes to: a quarter of a rank's time.
gc.collect()
gc.freeze()
