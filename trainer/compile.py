"""torch.compile, layer by layer: fused kernels instead of one kernel per operation. No communication of its own.

All decoder layers of a kind share one compiled program, so the first step pays for one layer, not for all. The layer's
`forward` is compiled, not its call: hooks that sharding registers on the layer stay outside and cause no graph breaks.
"""

from __future__ import annotations

import torch
from torch import nn

from trainer.model.build import held_layers


def apply_compile(model: nn.Module) -> None:
    """Compile the forward of every decoder layer on this rank, in place."""
    for layer in held_layers(model):
        layer.forward = torch.compile(layer.forward)
