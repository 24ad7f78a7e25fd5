"""What a rank does in tests of float8."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from tests.support.cases import train
from tests.support.parity import words

STEPS = 2


def count_products(mode: str) -> int:
    """Scaled products of a run without validation. mode: of recompute."""
    scaled_mm, calls = torch._scaled_mm, []  # pyright: ignore[reportPrivateImportUsage]

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return scaled_mm(*args, **kwargs)

    keys = (f"train.activation_checkpointing={mode}", "train.eval_samples=0", "train.micro_batch_size=8")
    with patch("torch._scaled_mm", counting):
        train(words("llama", "single", "fp8", STEPS, *keys))
    return len(calls)
