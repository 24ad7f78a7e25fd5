"""AdamW with its two moments in eight bits, taken out of them for each update.

    moment of N values ----> 256 values share a scale ----> 8-bit codes of a dynamic map     1 + 4 / 256 bytes per value

bitsandbytes does the arithmetic. What is small gains nothing from it and stays in 32 bits, and so do embeddings: few of
their rows get a gradient in a step, and those get large ones.
Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, sections 2.1 to 2.3).
Estimates read the sizes here, without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from configs.errors import EnvironmentProblem
from configs.schema import Optimizer as OptimizerConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 256
SMALLEST = 4096  # values, from which on a tensor's moments are quantized
TABLES_BYTES = 2 * 256 * 4  # what the codes of each moment mean, once for all parameters
SCALES = ("absmax1", "absmax2")  # of a parameter whose moments are quantized
CONSTANT = ("qmap1", "qmap2")  # those tables, among each parameter's states


def embeddings(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The tables of embeddings, those that are the head's matrix too among them."""
    from torch import nn

    inside = (module for whole in modules for module in whole.modules())
    return [parameter for module in inside if isinstance(module, nn.Embedding) for parameter in module.parameters()]


def state_bytes(numel: int, *, embedding: bool) -> tuple[int, ...]:
    """Bytes of each tensor that an update keeps for a parameter of so many values."""
    if embedding or numel < SMALLEST:
        return 4 * numel, 4 * numel
    scales = 4 * -(-numel // BLOCK)
    return numel, numel, scales, scales


def build_adamw_8bit(
    groups: list[dict[str, Any]], optimizer: OptimizerConfig, wide: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over the groups. wide: parameters whose moments stay in 32 bits whatever their size.

    Raises EnvironmentProblem without bitsandbytes.
    """
    import torch

    # It tells every process of faster kernels that are not installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise EnvironmentProblem(
            "optimizer=adamw_8bit: needs bitsandbytes; pip install 'distributed-training-cookbook[tuning]'"
        ) from None

    class GroupedAdamW8bit(AdamW8bit):
        """bitsandbytes names such parameters by `id` in a list of the whole process; here their group says it."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

        @torch.no_grad()
        def empty_states(self, parameter: nn.Parameter) -> dict[str, Any]:
            """A parameter's states before its first update, as the update itself would make them."""
            for index, group in enumerate(self.param_groups):
                for place, member in enumerate(group["params"]):
                    if member is parameter:
                        self.init_state(group, parameter, index, place)
            return self.state[parameter]

    kept = {id(parameter) for parameter in wide}
    split = []
    for group in groups:
        for bits in (8, 32):
            members = [p for p in group["params"] if (id(p) in kept) is (bits == 32)]
            if members:
                split.append({**group, "params": members, "optim_bits": bits})
    betas = (optimizer.beta1, optimizer.beta2)
    return GroupedAdamW8bit(split, lr=optimizer.lr, betas=betas, eps=optimizer.eps, min_8bit_size=SMALLEST)
