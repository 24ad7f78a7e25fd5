"""A moving average of the weights (`optimizer.ema`), as a state of any optimizer that makes the updates.

    before the first update   ema = weight
    after every update        ema = decay * ema + (1 - decay) * weight
    validation, export        ema replaces the weights, which are restored afterwards: `trainer.optim.placed.averaged`

As a state it has the parameter's device and division; checkpoints, estimates and preflight count it like moments. A
skipped update does not move the average. Training never reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.around import Around
from trainer.optim.parts import named
from trainer.optim.protocol import Average, Group, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

KIND = "ema"


class Averaging(Around):
    """It also keeps the average."""

    @property
    def ZEROED(self) -> bool:
        return False

    def problems(self, config: Config, view: View) -> Iterator[str]:
        yield from self.inner.problems(config, view)
        key = f"optimizer.ema={config.optimizer.ema}"
        for chosen, own in named(config.optimizer).items():
            if self.inner.average(own) is not None:
                yield f"{key}: {chosen}={own.name} averages the weights itself; leave it out"
        if config.parallel.engine is EngineName.deepspeed:
            yield (
                f"{key}: validates an average of the weights, and DeepSpeed computes with copies of its own; use"
                " parallel=fsdp, hsdp or tensor_fsdp, which shard as much, or leave it out"
            )

    def build(self, grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
        built = self.inner.build(grouped, settings, replicas=replicas)
        follow(built, settings.ema)
        return built

    def state(self, parameter: Described, settings: Settings, dtype: str) -> State:
        return {**self.inner.state(parameter, settings, dtype), **common.like(parameter, dtype, KIND)}

    def fresh(
        self, built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int
    ) -> dict[str, Any]:
        own = {KIND: state[KIND]}
        inner = {kind: kept for kind, kept in state.items() if kind != KIND}
        made = self.inner.fresh(built, parameter, inner, steps=steps)
        return {**made, **common.fresh(built, parameter, own, steps=steps)}

    def average(self, settings: Settings) -> Average:
        return Average(kind=KIND, part=1.0)

    def description(self, settings: Settings) -> str:
        return f"{self.inner.description(settings)}, and an average of the weights"


def follow(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Let the average follow each update of this optimizer."""
    import torch

    from trainer.optim.placed import local

    first: dict[torch.Tensor, torch.Tensor] = {}

    def updated() -> Iterator[torch.Tensor]:
        return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def before(*_: Any) -> None:
        # Not yet a state: optimizers create their own if they find none.
        first.update({p: p.detach().clone() for p in updated() if KIND not in optimizer.state.get(p, {})})

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter in updated():
            state = optimizer.state[parameter]
            if KIND not in state:
                state[KIND] = first.pop(parameter)
            local(state[KIND]).lerp_(local(parameter.detach()), 1 - decay)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
