"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): torch's, or DeepSpeed's for states in host memory.

torch's fused kernel, which CPU and CUDA both have, passes over memory once instead of a dozen times (`for_loop`), and
makes no temporary copies of all parameters (`foreach`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName, Implementation, OffloadDevice
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import common
from trainer.optim.common import OPTIONS, ZEROED, average, groups, instead, work  # noqa: F401
from trainer.optim.protocol import Group, Held, Spread, State
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (
    Implementation.fused,
    Implementation.foreach,
    Implementation.for_loop,
    Implementation.deepspeed_cpu,
)
USES = frozenset({"beta1", "beta2", "eps", "weight_decay"})


def problems(config: Config, view: View) -> Iterator[str]:
    deepspeed, offload = config.parallel.engine is EngineName.deepspeed, config.parallel.offload.optimizer
    if config.optimizer.implementation is Implementation.deepspeed_cpu and (
        offload is OffloadDevice.none or not deepspeed
    ):
        yield (
            "optimizer.implementation=deepspeed_cpu: is for an offloaded optimizer; use parallel=zero2_offload, or auto"
        )


def build(grouped: Sequence[Group], settings: Settings, *, replicas: Any = None) -> torch.optim.Optimizer:
    import torch

    params = [group.as_torch(settings.lr) for group in grouped]
    betas = (settings.beta1, settings.beta2)
    if settings.implementation is Implementation.deepspeed_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, lr=settings.lr, betas=betas, eps=settings.eps, adamw_mode=True)
    kernel = common.kernel(_implementation(settings))
    return torch.optim.AdamW(params, lr=settings.lr, betas=betas, eps=settings.eps, **kernel)


def _implementation(settings: Settings) -> Implementation:
    asked = settings.implementation
    return IMPLEMENTATIONS[0] if asked is Implementation.auto else asked


def state(parameter: Described, settings: Settings, dtype: str) -> State:
    moments = common.like(parameter, dtype, "exp_avg", "exp_avg_sq")
    return {**moments, **common.counter(host=_implementation(settings) is not Implementation.fused)}


def fresh(built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int) -> dict[str, Any]:
    made = common.fresh(built, parameter, state, steps=steps)
    if type(built).__module__.startswith("deepspeed"):
        made["step"] = steps  # DeepSpeedCPUAdam counts in Python
    return made


def temporaries(held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
    sizes = common.nbytes(held, dtype)
    match _implementation(settings):
        case Implementation.fused:
            return 0
        case Implementation.foreach:
            return sum(sizes)
        case _:
            # Two of the current parameter, and one of the previous parameter.
            return max((2 * size + before for size, before in zip(sizes, (0, *sizes), strict=False)), default=0)


def description(settings: Settings) -> str:
    return "states of 2 times the bytes it updates"
