"""AdamW with its two moments in eight bits, taken out of them for each update.

    moment of N values ----> 256 values share a scale ----> 8-bit codes of a dynamic map     1 + 4 / 256 bytes per value

bitsandbytes does the arithmetic. What is small gains nothing from it and stays in 32 bits, and so do embeddings: few of
their rows get a gradient in a step, and those get large ones.
Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, sections 2.1 to 2.3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import DType, EngineName, Implementation
from configs.errors import EnvironmentProblem
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described, Role
from trainer.optim import common
from trainer.optim.protocol import Group, Held, Kept, Spread, State

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (Implementation.fused,)
USES = frozenset({"beta1", "beta2", "eps", "weight_decay"})
OPTIONS = None
groups = common.decayed_and_plain
work = common.elementwise
BLOCK = 256
SMALLEST = 4096  # values, from which on a tensor's moments are quantized


def problems(config: Config, *, sharded: bool) -> Iterator[str]:
    """Blocks are counted from a tensor's first value: cut tensors have other blocks, and each layout would train on
    its own rounding."""
    if DType.float64 in (config.precision.param_dtype, config.precision.master_dtype):
        yield "precision=fp64: optimizer=adamw_8bit computes in float32; use optimizer=adamw, or precision=fp32"
    if config.parallel.engine is EngineName.deepspeed or sharded:
        yield (
            "optimizer.name=adamw_8bit: blocks of 256 values share a scale, and what cuts tensors cuts blocks, so that"
            " each layout would train otherwise; use parallel=single or ddp, or optimizer=adamw"
        )


def build(groups: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit over the groups. Raises EnvironmentProblem without bitsandbytes."""
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
        def fresh(self, parameter: torch.Tensor) -> dict[str, Any]:
            """A parameter's states before its first update, as the update itself would make them."""
            for index, group in enumerate(self.param_groups):
                for place, member in enumerate(group["params"]):
                    if member is parameter:
                        self.init_state(group, parameter, index, place)
            return self.state[parameter]

    split = []
    for group in groups:
        for bits in (8, 32):
            members = [p for about, p in group.parameters if (about.role is Role.embedding) is (bits == 32)]
            if members:
                split.append({**group.as_torch(settings.lr), "params": members, "optim_bits": bits})
    betas = (settings.beta1, settings.beta2)
    return GroupedAdamW8bit(split, lr=settings.lr, betas=betas, eps=settings.eps, min_8bit_size=SMALLEST)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    """absmax: the scales of blocks. qmap: what the codes mean."""
    if parameter.role is Role.embedding or parameter.numel < SMALLEST:
        return common.like(parameter, "float32", "state1", "state2")
    blocks = (-(-parameter.numel // BLOCK),)
    return {
        **common.like(parameter, "uint8", "state1", "state2"),
        **{kind: Kept(shape=blocks, dtype="float32") for kind in ("absmax1", "absmax2")},
        **{kind: Kept(shape=(256,), dtype="float32", shared=True) for kind in ("qmap1", "qmap2")},
    }


def fresh(built: Any, parameter: torch.Tensor, state: State, *, steps: int) -> dict[str, Any]:
    return {**built.fresh(parameter), "step": steps}


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    return 0


def said(settings: Settings) -> str:
    return (
        f"states of 2 x (1 + 4 / {BLOCK}) bytes per value, and 8 of embeddings and of tensors with fewer than"
        f" {SMALLEST:,} values"
    )
