"""The optimizer and its learning rate, the same under every engine.

The learning rate is a pure function of the step number. An engine sets it before each update, so it needs no saved
state, and a step that fp16 skips does not shift the schedule in one engine only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from configs.choices import Schedule
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim.by_role import divide
from trainer.optim.table import ask


def lr_at(config: Config, step: int) -> float:
    """Learning rate of update number `step` (from 0): linear warm-up to the peak, then the schedule.

    linear and cosine reach `min_lr_ratio` at the last step. warmup_stable_decay keeps the peak and decays linearly
    over the last `decay_steps` (Hu et al. 2024, MiniCPM, section 4).
    """
    schedule, peak, last = config.scheduler, config.optimizer.lr, config.train.steps - 1
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    match schedule.name:
        case Schedule.constant:
            return peak
        case Schedule.warmup_stable_decay:
            begin, length = last - schedule.decay_steps, schedule.decay_steps
        case _:
            begin, length = schedule.warmup_steps, last - schedule.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / length)) if length > 0 else 0.0
    if schedule.name is Schedule.cosine:
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * (1 - (1 - floor) * progress)


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    described: Mapping[str, Described],
    settings: Settings,
    *,
    replicas: Any = None,
) -> torch.optim.Optimizer:
    """The optimizer for the trained parameters.

    described: from `trainer.model.roles.describe`, while the parameters were undivided.
    replicas: the process group of ranks that hold the same plain tensors (DDP).
    """
    chosen = ask(settings)
    trained = [(described[name], parameter) for name, parameter in parameters if parameter.requires_grad]
    return chosen.build(divide(chosen.groups(trained, settings), settings), settings, replicas=replicas)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """lr: of the step. Each group has its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each group by its name; none if all groups have the same."""
    rates = {group["group"]: float(group["lr"]) for group in optimizer.param_groups}
    return rates if len(set(rates.values())) > 1 else {}
