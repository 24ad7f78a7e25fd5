"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): weights are averaged, the learning rate never decays.

    Y   the parameters, at which gradients are computed         Y = (1 - beta1) Z + beta1 X
    Z   what AdamW's steps without a first moment move          kept as a state
    X   the average of all Z, evaluated and exported            computed when asked for: Y + (1 - 1 / beta1) (Z - Y)

A step counts in the average as the square of the largest learning rate so far, so a warm-up counts little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName, Schedule
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import IMPLEMENTATIONS, OPTIONS, fresh, groups, instead, work  # noqa: F401
from trainer.optim.protocol import Average, Group, Held, Kept, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

ZEROED = False
USES = frozenset({"beta1", "beta2", "eps", "weight_decay"})


def problems(config: Config, view: View) -> Iterator[str]:
    if config.parallel.engine is EngineName.deepspeed:
        yield (
            "optimizer.name=schedule_free: evaluates an average of the weights, and DeepSpeed computes with copies of"
            " its own; use parallel=fsdp, hsdp or tensor_fsdp, which shard as much, or optimizer=adamw"
        )
    if config.scheduler.name is not Schedule.constant:
        yield (
            f"scheduler.name={config.scheduler.name}: optimizer.name=schedule_free averages weights instead of decaying"
            " the learning rate; use scheduler=constant, with scheduler.warmup_steps if you like"
        )
    if not config.optimizer.beta1:
        yield "optimizer.beta1=0.0: schedule_free's average is found from beta1; use 0.9, or 0.95 to 0.98 for long runs"


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    from trainer.optim.elementwise import Elementwise

    def start(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "z": parameter.detach().clone(),
            "exp_avg_sq": torch.zeros_like(parameter),
            **{kind: torch.zeros((), dtype=torch.float64) for kind in ("weight_sum", "lr_max")},
            "step": torch.zeros((), dtype=torch.float32),
        }

    params = [group.as_torch(settings.lr) for group in grouped]
    return Elementwise(params, _update, start, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def _update(
    weight: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    state["step"] += 1
    largest = max(lr, state["lr_max"].item())
    state["lr_max"].fill_(largest)
    state["weight_sum"] += largest**2
    part = largest**2 / state["weight_sum"].item()  # weight of this step in the average
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    moved = state["exp_avg_sq"].div(1 - beta2 ** state["step"].item()).sqrt_().add_(group["eps"])
    moved.reciprocal_().mul_(gradient).add_(weight, alpha=group["weight_decay"])
    weight.lerp_(state["z"], part).add_(moved, alpha=lr * (beta1 * (1 - part) - 1))
    state["z"].sub_(moved, alpha=lr)


def average(settings: Settings) -> Average | None:
    return Average(kind="z", part=1 - 1 / settings.beta1)


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    number = Kept(shape=(), dtype="float64", host=True)
    return {
        **common.like(parameter, dtype, "z", "exp_avg_sq"),
        "weight_sum": number,
        "lr_max": number,
        **common.counter(),
    }


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    return max(common.nbytes(held, dtype), default=0)


def description(settings: Settings) -> str:
    return "states of 2 times the bytes it updates, one of them the weights that the average is made of"
