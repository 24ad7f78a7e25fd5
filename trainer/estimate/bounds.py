"""Lower and upper bounds of a rank's memory, from sizes alone, without the model's code. Torch-free.

    below    parameters, gradients, master weights and moments, as far as the layout leaves them on the GPU
    above    that, all parameters and gradients once more as buffers, and the activations of a dense decoder that keeps
             every intermediate tensor in float32: twice s b h (34 + 5 a s / h) bytes per layer (Korthikanti et al.
             2022, arXiv:2205.05198, equation 1), four copies of the logits, and 256 MiB of workspace

The planner drops layouts whose lower bound does not fit; for a model that cannot be traced these bounds are the answer.
"""

from __future__ import annotations

from configs.choices import BYTES, EngineName, OffloadDevice
from configs.schema import Config, Optimizer
from trainer.axes import CONTEXT, PIPELINE, SHARD, TENSOR
from trainer.optim.table import moments
from trainer.plan.model_fields import config_fields, sizes
from trainer.plan.plan import Plan
from trainer.update import ask

WORKSPACE_BYTES = 2**28


def states_bytes(plan: Plan, parameters: int, optimizer: Optimizer, *, frozen: int = 0, most: bool = False) -> float:
    """Bytes that a rank needs on its GPU, whatever the batch is.

    parameters: trained parameters of the whole model.
    frozen: bytes of all the frozen ones.
    most: of parameters for which the optimizer keeps the most states, not the least.
    """
    only_held = 0.0
    if plan.offload_parameters is OffloadDevice.none:
        held = frozen / (plan.degree(TENSOR) * plan.degree(PIPELINE))
        only_held = held / plan.parameter_shards + held * _stay_gathered(plan)
    gradients = ask(optimizer).GRADIENTS
    return only_held + _trained_bytes(plan, parameters, moments(optimizer, most=most), gradients=gradients)


def _stay_gathered(plan: Plan) -> bool:
    """Whether FSDP2 keeps all parameters of a stage in addition to its own shards until the backward is done."""
    return plan.engine is EngineName.torch and plan.fsdp_size > 1 and not plan.reshard_after_forward


def _trained_bytes(plan: Plan, parameters: int, kept_moments: float, *, gradients: bool) -> float:
    kept = 1 + kept_moments
    held = parameters / (plan.degree(TENSOR) * plan.degree(PIPELINE))
    width, master = BYTES[plan.param_dtype], BYTES[plan.master_dtype]
    on_gpu = plan.offload_optimizer is OffloadDevice.none
    if plan.engine is EngineName.deepspeed:
        shards = plan.degree(SHARD)
        whole = 0.0 if plan.zero_stage == 3 else held * width
        partitioned = kept * master * on_gpu + (width if plan.zero_stage == 3 and on_gpu else 0)
        return whole + held * partitioned / shards
    if not on_gpu:
        return 0.0
    gathered = held * width * _stay_gathered(plan)
    kept_gradients = gradients * held * master / (plan.fsdp_size if plan.degree(PIPELINE) == 1 else 1)
    return gathered + kept_gradients + kept * master * held / plan.fsdp_size


def partitions(plan: Plan) -> bool:
    """Whether a trace makes the graphs of compiled layers, which is impossible for layers that contain collectives."""
    return plan.degree(TENSOR) == plan.degree(CONTEXT) == 1


def upper_bytes(config: Config, plan: Plan, parameters: int) -> float | None:
    """Bytes that a rank should never exceed, under the assumption above; None where the config does not give the
    sizes."""
    known = sizes(config_fields(config))
    if not (known.hidden and known.layers and known.heads and known.vocabulary):
        return None
    tokens, seq_len = plan.batch.micro_batch_size * plan.batch.seq_len, plan.batch.seq_len
    activations = 2 * known.layers * tokens * (34 * known.hidden + 5 * known.heads * seq_len)
    logits = 4 * 4 * tokens * known.vocabulary
    held = parameters / (plan.degree(TENSOR) * plan.degree(PIPELINE))
    buffers = held * (BYTES[plan.param_dtype] + BYTES[plan.master_dtype])
    return (
        states_bytes(plan, parameters, config.optimizer, most=True) + buffers + activations + logits + WORKSPACE_BYTES
    )
