"""An adapter's initial values, by `tuning.init`, and DoRA's row magnitudes.

    kaiming    A as a linear layer's, B = 0                                step 1 starts from the model itself
    gaussian   A normal with deviation 1 / rank, B = 0                     the same
    pissa      W = U S V': B A from the largest singular values of W       frozen is W - scale * B A
    olora      W = Q R: B the first columns of Q, A the first rows of R    frozen is W - scale * B A

With the last two, the frozen matrix changes depending on the matrix alone, so it is recomputed at every start, and an
adapter's file is sufficient: peft recomputes it too. Meng et al. 2024 (PiSSA, arXiv:2404.02948), Bueyuekakyuez
2024 (OLoRA, arXiv:2406.01775), Liu et al. 2024 (DoRA, arXiv:2402.09353), Kalajdzievski 2023 (rsLoRA, arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from configs.choices import AdapterInit
from trainer.model.layers import is_transposed
from trainer.model.peft import NAME

PEFT_INIT: dict[AdapterInit, bool | str] = {
    AdapterInit.kaiming: True,
    AdapterInit.gaussian: "gaussian",
    AdapterInit.pissa: "pissa",
    AdapterInit.olora: "olora",
}
RESIDUAL = (AdapterInit.pissa, AdapterInit.olora)
"""Adapters that begin as a part of the frozen matrix, which keeps the rest."""
Generators = Callable[[str, torch.device], torch.Generator]


def begin(layer: Any, init: AdapterInit, generator: Generators) -> None:
    """Fill the adapter of one layer, whose frozen weight is complete and filled. generator: by parameter and device."""
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    scale: float = layer.scaling[NAME]
    if init in RESIDUAL:
        weight = _matrix(layer.base_layer)
        if init is AdapterInit.pissa:
            _largest_part(weight, a, b, scale)
        else:
            _orthogonal_part(weight, a, b)
        weight.sub_(b @ a, alpha=scale)
    else:
        drawn = generator(f"lora_A.{NAME}.weight", a.device)
        if init is AdapterInit.gaussian:
            nn.init.normal_(a, std=1 / layer.r[NAME], generator=drawn)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=drawn)
        nn.init.zeros_(b)
    if NAME in getattr(layer, "lora_magnitude_vector", {}):
        lengths = torch.linalg.norm(_matrix(layer.base_layer) + scale * (b @ a), dim=1)
        layer.lora_magnitude_vector[NAME].weight.copy_(lengths)


def _matrix(layer: nn.Module) -> torch.Tensor:
    """[out, in], a view of the layer's weight."""
    weight = layer.get_parameter("weight").data
    return weight.T if is_transposed(layer) else weight


def _largest_part(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    rank = a.shape[0]
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    roots = (s[:rank] / scale).sqrt()
    # A pair of singular vectors may have either sign: the one with a positive sum is the same on every machine.
    signs = torch.where(v[:rank].sum(dim=1) < 0, -1.0, 1.0).to(roots.dtype)
    a.zero_()[: len(roots)] = (roots * signs)[:, None] * v[:rank]
    b.zero_()[:, : len(roots)] = u[:, :rank] * (roots * signs)


def _orthogonal_part(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    rank = min(a.shape[0], *weight.shape)
    q, r = torch.linalg.qr(weight)
    a.zero_()[:rank], b.zero_()[:, :rank] = r[:rank], q[:, :rank]
