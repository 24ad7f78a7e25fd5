"""An optimizer around another one, which makes the updates: questions that it does not answer go to the inner one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.choices import Implementation
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim.protocol import Average, Group, Held, Optimizer, Spread, State, Work
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Around:
    """Fulfils `Optimizer`. inner: the one that makes the updates."""

    inner: Optimizer

    @property
    def IMPLEMENTATIONS(self) -> Sequence[Implementation]:
        return self.inner.IMPLEMENTATIONS

    @property
    def USES(self) -> frozenset[str]:
        return self.inner.USES

    @property
    def OPTIONS(self) -> type | None:
        return self.inner.OPTIONS

    @property
    def ZEROED(self) -> bool:
        return self.inner.ZEROED

    def problems(self, config: Config, view: View) -> Iterator[str]:
        yield from self.inner.problems(config, view)

    def groups(self, parameters: Sequence[tuple[Described, torch.nn.Parameter]], settings: Settings) -> list[Group]:
        return self.inner.groups(parameters, settings)

    def build(self, grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
        return self.inner.build(grouped, settings, replicas=replicas)

    def instead(self, parameter: Described, settings: Settings) -> Settings | None:
        return self.inner.instead(parameter, settings)

    def state(self, parameter: Described, settings: Settings, dtype: str) -> State:
        return self.inner.state(parameter, settings, dtype)

    def fresh(
        self, built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int
    ) -> dict[str, Any]:
        return self.inner.fresh(built, parameter, state, steps=steps)

    def temporaries(self, held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
        return self.inner.temporaries(held, settings, dtype, spread)

    def average(self, settings: Settings) -> Average | None:
        return self.inner.average(settings)

    def work(self, parameter: Described, settings: Settings) -> Work:
        return self.inner.work(parameter, settings)

    def description(self, settings: Settings) -> str:
        return self.inner.description(settings)
