"""The update inside the backward: each gradient is applied and freed as soon as it is computed.

    usual         backward:  g1 g2 ... gL  all kept          update:  w1 w2 ... wL
    in_backward   backward:  gL -> wL, free | ... | g1 -> w1, free

    single   as autograd completes a gradient
    ddp      one all-reduce per gradient, which runs while the backward computes the next one
    fsdp     as FSDP2 has reduce-scattered a group: each rank updates its own shards

The global norm is known only after the last gradient. Clipping by it therefore takes a first forward and backward that
only measures, and a second one, with the same random numbers, that applies. A step holds the gradients of one group
instead of the whole model. Lv et al. 2023 (LOMO, arXiv:2306.09782), with SGD and both ways of clipping; Lv et al. 2023
(AdaLomo, arXiv:2310.10195), with Adafactor's update.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.choices import DType, EngineName, NonFinite
from configs.schema import Config, Optimizer
from trainer.axes import EXPERTS, PIPELINE, TENSOR
from trainer.plan.batch import BatchPlan
from trainer.update.passes import Passes

GRADIENTS = False
KEY = "optimizer.in_backward=true"
REASONS = {
    PIPELINE: "adds up the gradients of several micro-batches",
    TENSOR: "sums some gradients over its ranks once a step",
    EXPERTS: "averages the experts' gradients once a step",
}
"""Why an axis of more than one rank needs all gradients at once."""


def wanted(settings: Optimizer) -> bool:
    return settings.in_backward


def problems(config: Config, batch: BatchPlan) -> Iterator[str]:
    train = config.train
    if config.parallel.engine is EngineName.deepspeed:
        yield f"{KEY}: DeepSpeed updates its own partitions after the backward; use parallel=fsdp, or set it to false"
    for axis, reason in REASONS.items():
        degree = getattr(config.parallel, axis)
        if degree != 1:
            value = "null" if degree is None else degree
            yield f"{KEY}: parallel.{axis}={value} {reason}; use parallel=ddp, fsdp or hsdp, or set it to false"
    if batch.gradient_accumulation_steps > 1 and config.parallel.pp == 1:
        yield (
            f"{KEY}: a gradient is gone before the next micro-batch could be added, and train.gradient_accumulation"
            f"_steps is {batch.gradient_accumulation_steps}; raise train.micro_batch_size until it is 1"
        )
    if config.precision.param_dtype is DType.float16:
        yield (
            f"{KEY}: precision=fp16 leaves out an update whose gradient overflows, which is known only after the"
            " backward; use precision=bf16"
        )
    if not train.clip_grad_norm and train.non_finite is NonFinite.skip:
        yield (
            f"train.non_finite=skip: with {KEY} part of an update has been made when a gradient shows that is not"
            " finite; use train.non_finite=stop, or train.clip_grad_norm=1, whose first backward finds it"
        )


def passes(config: Config) -> Passes:
    """A separate forward and backward measures a global norm."""
    count = 2 if config.train.clip_grad_norm else 1
    return Passes(forwards=count, backwards=count)


def description(config: Config) -> str:
    again = ", forward and backward run twice for the global norm" if config.train.clip_grad_norm else ""
    return f"each gradient is applied and freed inside the backward{again}"
