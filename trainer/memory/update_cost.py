"""What the trainer's optimizer allocates, seen on small tensors: its states, and what an update needs for a moment."""

from __future__ import annotations

import torch

from configs.schema import Config
from trainer.memory.profile import UpdateCost
from trainer.memory.tracker import StorageTracker, balance
from trainer.optimizer import build_optimizer


def update_cost(config: Config) -> UpdateCost:
    """Run the trainer's optimizer on small tensors and see what it allocates."""
    one, three = _updated(config, 1), _updated(config, 3)
    size = 4096 * 4
    temporary_all = (three[1] - one[1]) / (2 * size)
    constant = one[0] % size
    return UpdateCost(
        state=(one[0] - constant) / size,
        state_constant=constant,
        temporary_all=temporary_all,
        temporary_largest=max(0.0, one[1] / size - temporary_all),
    )


def _updated(config: Config, tensors: int) -> tuple[int, int]:
    """Bytes of state after two updates of `tensors` matrices of 4096 float32, and temporary bytes in the second."""
    parameters = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter.data)
    optimizer = build_optimizer([{"params": parameters}], config.optimizer)
    with StorageTracker() as tracker:
        optimizer.step()
        tracker.mark("second")
        optimizer.step()
    held = list(balance(tracker.events))
    second = next(index for index, (name, _) in enumerate(held) if name == "second")
    state = held[second][1]
    return state, max(size for _, size in held[second:]) - state
