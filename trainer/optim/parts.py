"""The answers of several optimizers as those of one, if different optimizers update the parameters. Torch-free.

optimizer.groups.ROLE.name     optimizer for the parameters of a role
`instead` of an optimizer      optimizer for the parameters that it leaves to another
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from configs.choices import EngineName, Implementation, OptimizerName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import by_role
from trainer.optim.protocol import Average, Group, Held, Optimizer, Spread, State, Work
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

Optimizers = Mapping[OptimizerName, Optimizer]
Item = TypeVar("Item")
NAME = "optimizer.name"


def named(settings: Settings) -> dict[str, Settings]:
    """The optimizers that are chosen by name, by the key that chooses each."""
    roles = by_role.names(settings)
    others = {f"{by_role.KEY}.{role}.name": by_role.by(settings, name) for role, name in roles.items()}
    return {NAME: by_role.by(settings, settings.name), **others}


def settings_of(optimizers: Optimizers, parameter: Described, settings: Settings) -> Settings:
    """The optimizer of a parameter."""
    chosen = by_role.by(settings, by_role.names(settings).get(by_role.role_of(parameter), settings.name))
    return optimizers[chosen.name].instead(parameter, chosen) or chosen


@dataclass(frozen=True)
class Parts:
    """Fulfils `Optimizer`."""

    optimizers: Optimizers
    settings: Settings

    @property
    def IMPLEMENTATIONS(self) -> Sequence[Implementation]:
        """Implementations that all have."""
        first, *others = (self.optimizers[one.name] for one in named(self.settings).values())
        return [how for how in first.IMPLEMENTATIONS if all(how in other.IMPLEMENTATIONS for other in others)]

    @property
    def USES(self) -> frozenset[str]:
        return frozenset().union(*(self.optimizers[one.name].USES for one in named(self.settings).values()))

    @property
    def OPTIONS(self) -> type | None:
        return self.optimizers[self.settings.name].OPTIONS

    @property
    def ZEROED(self) -> bool:
        return all(self.optimizers[one.name].ZEROED for one in named(self.settings).values())

    def problems(self, config: Config, view: View) -> Iterator[str]:
        said: set[str] = set()
        for key, settings in named(config.optimizer).items():
            chosen = self.optimizers[settings.name]
            if key != NAME and config.parallel.engine is EngineName.deepspeed:
                yield (
                    f"{key}={settings.name}: DeepSpeed partitions the states of one optimizer; use parallel=fsdp, hsdp"
                    " or tensor_fsdp, which shard as much, or leave it out"
                )
                continue
            other = None if key == NAME else chosen.instead(by_role.typical(key.split(".")[2]), settings)
            if other is not None:
                yield f"{key}={settings.name}: {settings.name} leaves such parameters to {other.name}; use {other.name}"
                continue
            own = replace(config, optimizer=settings)
            for line in chosen.problems(own, view):
                if line not in said:
                    yield line.replace(f"{NAME}=", f"{key}=")
                said.add(line)

    def groups(self, parameters: Sequence[tuple[Described, torch.nn.Parameter]], settings: Settings) -> list[Group]:
        found: list[Group] = []
        for own, items in self._divided([(about, (about, parameter)) for about, parameter in parameters], settings):
            left = own.name not in {one.name for one in named(settings).values()}
            for group in self.optimizers[own.name].groups(items, own):
                found.append(
                    replace(
                        group,
                        name=str(own.name) if left else group.name,
                        factor=group.factor * own.lr / settings.lr,
                        settings={**group.settings, "optimizer": str(own.name)},
                    )
                )
        return [group for group in found if group.parameters]

    def build(self, grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
        from trainer.optim.several import Several

        built: dict[str, torch.optim.Optimizer] = {}
        for group in grouped:
            name = group.settings["optimizer"]
            if name not in built:
                members = [one for one in grouped if one.settings["optimizer"] == name]
                own = by_role.by(settings, OptimizerName(name))
                built[name] = self.optimizers[own.name].build(members, own, replicas=replicas)
        return Several(built)

    def instead(self, parameter: Described, settings: Settings) -> Settings | None:
        return None

    def state(self, parameter: Described, settings: Settings, dtype: str) -> State:
        own = settings_of(self.optimizers, parameter, settings)
        return self.optimizers[own.name].state(parameter, own, dtype)

    def fresh(
        self, built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int
    ) -> dict[str, Any]:
        from trainer.optim.several import Several

        assert isinstance(built, Several)
        name = built.of(parameter)
        return self.optimizers[OptimizerName(name)].fresh(built.parts[name], parameter, state, steps=steps)

    def temporaries(self, held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
        """One optimizer updates after the other."""
        return max(
            (
                self.optimizers[own.name].temporaries(items, own, dtype, spread)
                for own, items in self._divided([(one.whole, one) for one in held], settings)
            ),
            default=0,
        )

    def average(self, settings: Settings) -> Average | None:
        averages = (self.optimizers[one.name].average(one) for one in named(settings).values())
        return next((average for average in averages if average is not None), None)

    def work(self, parameter: Described, settings: Settings) -> Work:
        own = settings_of(self.optimizers, parameter, settings)
        return self.optimizers[own.name].work(parameter, own)

    def description(self, settings: Settings) -> str:
        chosen = named(settings)
        first = chosen.pop(NAME)
        roles = [
            f"{key.split('.')[2]} by {one.name}: {self.optimizers[one.name].description(one)}"
            for key, one in chosen.items()
        ]
        return "; ".join([self.optimizers[first.name].description(first), *roles])

    def _divided(
        self, items: Sequence[tuple[Described, Item]], settings: Settings
    ) -> list[tuple[Settings, list[Item]]]:
        """By their optimizer, `optimizer.name` first."""
        found: dict[tuple[str, float, float], tuple[Settings, list[Item]]] = {}
        for about, item in items:
            own = settings_of(self.optimizers, about, settings)
            found.setdefault((own.name, own.lr, own.weight_decay), (own, []))[1].append(item)
        return sorted(found.values(), key=lambda one: one[0].name != settings.name)
