"""SGD with momentum, torch's. Its fused kernel does not support sharded parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName, Implementation
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import OPTIONS, ZEROED, average, fresh, groups, instead, work  # noqa: F401
from trainer.optim.protocol import Group, Held, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (Implementation.foreach, Implementation.fused, Implementation.for_loop)
USES = frozenset({"beta1", "weight_decay"})


def problems(config: Config, view: View) -> Iterator[str]:
    sharded = view.is_sharded and config.parallel.engine is EngineName.torch
    if config.optimizer.implementation is Implementation.fused and sharded:
        yield "optimizer.implementation=fused: torch has no fused sgd for sharded parameters; use foreach or auto"


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    asked = settings.implementation
    kernel = common.kernel(IMPLEMENTATIONS[0] if asked is Implementation.auto else asked)
    params = [group.as_torch(settings.lr) for group in grouped]
    return torch.optim.SGD(params, lr=settings.lr, momentum=settings.beta1, **kernel)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    return common.like(parameter, dtype, "momentum_buffer") if settings.beta1 else {}


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    return 0


def description(settings: Settings) -> str:
    return f"states of {int(settings.beta1 > 0)} times the bytes it updates"
