"""States in memory that a GPU and its host share (`optimizer.paged`), for any optimizer.

    before the first update   the states of large parameters are made there, as zeros     (`managed`)
    update                    as it is: its kernels read and write what looks like a tensor of the GPU
    checkpoint                the same tensors as without pages: a run goes on with them or without

So every layout computes the same as without pages. bitsandbytes' own paged optimizers do not: their codes depend on a
rank's piece. Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 3) page the states of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName, OffloadDevice, OptimizerName
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import by_role
from trainer.optim.around import Around
from trainer.optim.managed import KEY, check
from trainer.optim.parts import named
from trainer.optim.protocol import COUNTER, Group, Kept, Optimizer, State

if TYPE_CHECKING:
    import torch

SMALLEST = 100_000  # minimum number of values of a parameter whose states are paged: pages are large


def problems(config: Config, device: str, optimizers: Mapping[OptimizerName, Optimizer]) -> Iterator[str]:
    if not config.optimizer.paged:
        return
    offload = config.parallel.offload
    if device != "cuda":
        yield f"{KEY}: states move between a GPU and its host, and this run is on {device}; leave it out"
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            f"{KEY}: DeepSpeed makes the states of its partitions itself; use parallel=zero2_offload, which keeps them"
            " in host memory, or parallel=fsdp"
        )
    elif offload.parameters is not OffloadDevice.none:
        yield (
            f"{KEY}: parallel.offload.parameters={offload.parameters} keeps states in host memory for good; leave one"
            " of the two out"
        )
    typical = by_role.typical("matrix")
    for key, own in named(config.optimizer).items():
        chosen = optimizers[own.name]
        if not chosen.ZEROED:
            yield f"{KEY}: {key}={own.name} begins with states that are no zeros, and makes them itself; leave it out"
        elif not chosen.state(typical, own, "float32").keys() - {COUNTER}:
            yield f"{KEY}: {key}={own.name} keeps no states; leave it out"


class Paged(Around):
    """Its states are in memory that GPU and host share."""

    def build(self, grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
        built = self.inner.build(grouped, settings, replicas=replicas)
        start(built, self, settings, {p: about for group in grouped for about, p in group.parameters})
        return built

    def state(self, parameter: Described, settings: Settings, dtype: str) -> State:
        """By the whole parameter, so all ranks and layouts agree."""
        state = self.inner.state(parameter, settings, dtype)
        if prod(parameter.whole) < SMALLEST:
            return state
        return {kind: kept if kind == COUNTER or kept.host else _paged(kept) for kind, kept in state.items()}

    def description(self, settings: Settings) -> str:
        return f"{self.inner.description(settings)}, paged to host memory when the GPU is full"


def start(
    optimizer: torch.optim.Optimizer, paged: Paged, settings: Settings, described: Mapping[torch.Tensor, Described]
) -> None:
    """Create each parameter's states before its first update: optimizers create only those that they do not find.

    Raises EnvironmentProblem if a GPU's parameters cannot have them.
    """
    if any(parameter.is_cuda for parameter in described):
        check()

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not optimizer.state.get(parameter):
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    table = paged.state(described[parameter], settings, dtype)
                    optimizer.state[parameter] = paged.fresh(optimizer, parameter, table, steps=0)

    optimizer.register_step_pre_hook(before)


def _paged(kept: Kept) -> Kept:
    return replace(kept, paged=True)
