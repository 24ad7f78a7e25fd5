"""The optimizer and its learning rate, the same under every engine.

The learning rate is a pure function of the step number. An engine sets it before each update, so nothing about
it needs saving, and a step that fp16 skips does not shift the schedule in one engine and not in the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from configs.choices import Implementation, OptimizerName, Schedule
from configs.schema import Config
from configs.schema import Optimizer as OptimizerConfig
from trainer.optim.adamw_8bit import build_adamw_8bit

AUTO = {
    OptimizerName.adamw: Implementation.fused,
    OptimizerName.sgd: Implementation.foreach,
    OptimizerName.adafactor: Implementation.for_loop,
    OptimizerName.adamw_8bit: Implementation.fused,
}
SMALLEST_SCALE = 1e-3  # Adafactor's epsilon 2: a parameter whose elements are all zero still moves


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


def param_groups(parameters: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings decay, norms and biases do not.

    A parameter that ZeRO 3 has partitioned is empty; DeepSpeed keeps its true shape in `ds_shape`.
    """
    decayed, plain = [], []
    for _, parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimizerConfig, *, embeddings: Iterable[torch.nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """torch's optimizer over the groups, or bitsandbytes' for 8-bit states, which `embeddings` do not get.

    `auto` takes AdamW's fused kernel, which CPU and CUDA both have: one pass over memory instead of a dozen, and no
    temporary copies of all parameters as `foreach` makes. torch has no fused SGD for sharded parameters. Adafactor has
    no fused kernel at all, and is chosen for its memory: one parameter after the other.
    """
    if config.name is OptimizerName.adamw_8bit:
        return build_adamw_8bit(groups, config, embeddings)
    implementation = config.implementation
    if implementation is Implementation.auto:
        implementation = AUTO[config.name]
    if config.name is OptimizerName.adafactor:
        foreach = implementation is Implementation.foreach
        return torch.optim.Adafactor(groups, lr=config.lr, eps=(config.eps, SMALLEST_SCALE), foreach=foreach)
    kernel: dict[str, Any] = {
        "fused": implementation is Implementation.fused,
        "foreach": implementation is Implementation.foreach,
    }
    if config.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1, **kernel)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, **kernel)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
