"""What the trainer's optimizer allocates, seen on small tensors: its states, and what an update needs for a moment."""

from __future__ import annotations

from math import prod

import torch

from configs.choices import OptimizerName
from configs.schema import Config
from trainer.estimate.profile import UpdateCost
from trainer.estimate.tracker import StorageTracker, balance
from trainer.optim.build import build_optimizer

SIDE, WIDTH = 256, 4  # of the square matrices, float32
SIZE = SIDE * SIDE * WIDTH


def update_cost(config: Config) -> UpdateCost:
    """Run the trainer's optimizer on small tensors and see what it allocates.

    States: a matrix of R rows and C columns has matrix R C + row R + column C + constant, a vector of N has vector N +
    constant. Doubling one side or both at a time tells them apart. Temporaries: from one, two and three of a size.
    """
    square, wide, tall, large = (
        updated(config, [shape])[0]
        for shape in ((SIDE, SIDE), (SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))
    )
    vector = updated(config, [(SIDE,)])[0], updated(config, [(2 * SIDE,)])[0]
    one, two, three = (updated(config, [(SIDE, SIDE)] * count)[1] / SIZE for count in (1, 2, 3))
    matrix, side = (large - wide - tall + square) / SIZE, SIDE * WIDTH
    temporary_all = max(0.0, three - two)
    before = max(0.0, two - one - temporary_all)
    return UpdateCost(
        state=(vector[1] - vector[0]) / side,
        state_matrix=matrix,
        state_row=(tall - square - matrix * SIZE) / side,
        state_column=(wide - square - matrix * SIZE) / side,
        state_constant=2 * vector[0] - vector[1],
        temporary_all=temporary_all,
        temporary_largest=max(0.0, one - temporary_all),
        temporary_before=before,
        eight_bits=config.optimizer.name is OptimizerName.adamw_8bit,
    )


def updated(config: Config, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Bytes of state after two updates of float32 tensors of these shapes, and temporary bytes in the second."""
    parameters = [torch.nn.Parameter(torch.ones(prod(shape)).reshape(shape)) for shape in shapes]
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
