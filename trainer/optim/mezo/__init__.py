"""States and memory of MeZO. Its step: `trainer.update.mezo` and `direction`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, DType
from configs.ranges import Range
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim.common import IMPLEMENTATIONS, ZEROED, average, fresh, groups, instead, work  # noqa: F401
from trainer.optim.options import RANGE
from trainer.optim.protocol import Group, Held, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

USES = frozenset({"weight_decay"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`optimizer.options` of MeZO. epsilon: distance from the weights at which the loss is measured."""

    epsilon: float = field(default=1e-3, metadata={RANGE: Range(least=0, most=1, above=True)})


OPTIONS = Options


def problems(config: Config, view: View) -> Iterator[str]:
    """`trainer.update.mezo` has them."""
    yield from ()


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    from trainer.optim.mezo.direction import Direction

    names = ([about.name for about, _ in group.parameters] for group in grouped)
    return Direction(
        [{**group.as_torch(settings.lr), "names": given} for group, given in zip(grouped, names, strict=True)]
    )


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    return {}


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    """The direction of one whole parameter, and this rank's piece of it."""
    width = BYTES[DType.float32]
    pieces = (0 if one.shape == one.whole.shape else one.piece.numel for one in held)
    sizes = (one.whole.numel + piece for one, piece in zip(held, pieces, strict=True))
    return width * max(sizes, default=0)


def description(settings: Settings) -> str:
    return "no states"
