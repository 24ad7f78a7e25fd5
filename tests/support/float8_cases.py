"""The work of a rank in tests of float8."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tests.support.cases import train
from tests.support.parity import Trained, words
from trainer import passes
from trainer.axes.tensor.vocabulary import chunked_cross_entropy_sum

STEPS = 2


def train_with_the_loss_of_a_stage(overrides: list[str]) -> Trained:
    """Train a single process with the loss of a pipeline's last stage: its gradient has other last bits than torch's,
    and one of them may flip a float8 code."""
    with patch.object(passes, "cross_entropy_sum", chunked_cross_entropy_sum):
        return train(overrides)


def count_products(mode: str) -> int:
    """Count the scaled matmuls of a run without validation.

    mode: recompute mode (`train.activation_checkpointing`).
    """
    scaled_mm, calls = torch._scaled_mm, []  # pyright: ignore[reportPrivateImportUsage]

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return scaled_mm(*args, **kwargs)

    keys = (f"train.activation_checkpointing={mode}", "train.eval_samples=0", "train.micro_batch_size=8")
    with patch("torch._scaled_mm", counting):
        train(words("llama", "single", "fp8", STEPS, *keys))
    return len(calls)


def cut_products() -> tuple[float, float, float]:
    """Compare a block-scaled layer with its two halves, as tensor-parallel ranks hold them.

    Returns three differences:
    concatenated results of the halves from those of the whole layer,
    summed results of the halves from those of the whole layer,
    output of the whole layer from that of an unquantized matmul.
    """
    torch.manual_seed(0)
    weight, given, gradient = torch.randn(192, 128), torch.randn(2, 32, 128), torch.randn(2, 32, 192)
    output, of_input, of_weight = _products(weight, given, gradient)
    rows = [_products(weight[part], given, gradient[..., part]) for part in (slice(0, 96), slice(96, 192))]
    columns = [_products(weight[:, part], given[..., part], gradient) for part in (slice(0, 64), slice(64, 128))]
    joined = [
        _apart(torch.cat([half[0] for half in rows], -1), output),
        _apart(torch.cat([half[2] for half in rows]), of_weight),
        _apart(torch.cat([half[1] for half in columns], -1), of_input),
        _apart(torch.cat([half[2] for half in columns], -1), of_weight),
    ]
    added = [_apart(rows[0][1] + rows[1][1], of_input), _apart(columns[0][0] + columns[1][0], output)]
    return max(joined), max(added), _apart(output, given @ weight.T)


def _products(weight: torch.Tensor, given: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, and gradient of the weight."""
    from trainer.linear.float8_layers import LinearMX  # torchao, which only ranks import

    layer, given = nn.Linear(weight.shape[1], weight.shape[0], bias=False), given.clone().requires_grad_()
    layer.weight.data = weight.contiguous()
    layer.__class__ = LinearMX
    output = layer(given)
    output.backward(gradient.contiguous())
    assert given.grad is not None and layer.weight.grad is not None
    return [output.detach(), given.grad, layer.weight.grad]


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
