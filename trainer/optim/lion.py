"""Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a momentum, so that every element moves by the learning rate.

U <- sign(beta1 M + (1 - beta1) G)        W <- (1 - lr weight_decay) W - lr U        M <- beta2 M + (1 - beta2) G
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import IMPLEMENTATIONS, OPTIONS, ZEROED, average, fresh, groups, instead, work  # noqa: F401
from trainer.optim.protocol import Group, Held, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

USES = frozenset({"beta1", "beta2", "weight_decay"})


def problems(config: Config, view: View) -> Iterator[str]:
    yield from ()


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    from trainer.optim.elementwise import Elementwise

    params = [group.as_torch(settings.lr) for group in grouped]
    betas = (settings.beta1, settings.beta2)
    return Elementwise(params, _update, lambda p: {"exp_avg": torch.zeros_like(p)}, betas=betas)


def _update(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
) -> None:
    (beta1, beta2), momentum = group["betas"], state["exp_avg"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(momentum.lerp(gradient, 1 - beta1).sign_(), alpha=-group["lr"])
    momentum.lerp_(gradient, 1 - beta2)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    return common.like(parameter, dtype, "exp_avg")


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    return max(common.nbytes(held, dtype), default=0)


def description(settings: Settings) -> str:
    return "states of 1 times the bytes it updates"
