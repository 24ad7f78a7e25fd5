"""The explanation of an estimate: the formula of every term, with this configuration's numbers and its source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.choices import BYTES, Checkpointing, EngineName
from configs.schema import Config
from trainer.axes import CONTEXT, PIPELINE, TENSOR
from trainer.axes.pipeline.timeline import in_flight, receive_buffers
from trainer.engine.deepspeed.settings import accumulating
from trainer.estimate.bounds import partitions
from trainer.estimate.estimate import CUBLAS_HANDLES, GIB, Estimate, communicators, cublas_bytes
from trainer.estimate.profile import Anatomy
from trainer.estimate.profiles import stage_layers
from trainer.estimate.verdict import ABOVE, COMPILED_KEEPS
from trainer.optim.protocol import Held, Spread
from trainer.optim.table import ask
from trainer.plan.plan import Plan
from trainer.update import ask as ask_update


def explain(config: Config, plan: Plan, found: Estimate) -> str:
    """Lines below the table: the contents of each row, and the assumptions."""
    return "\n".join(["", "", "how it was counted", *(f"  {line}" for line in _lines(config, plan, found))])


def _lines(config: Config, plan: Plan, found: Estimate) -> Iterator[str]:
    anatomy = found.profile.anatomy
    master, param = BYTES[plan.master_dtype], BYTES[plan.param_dtype]
    share = f" that one of {plan.degree(TENSOR)} tensor-parallel ranks holds" if plan.degree(TENSOR) > 1 else ""
    yield f"P = {anatomy.numel:,} parameters of {anatomy.name}{share}, counted on the built model; tied ones count once"
    if (routing := anatomy.routing()) is not None:
        yield f"{anatomy.active:,} of them are active for a token: {routing}"
    if plan.degree(PIPELINE) > 1:
        yield from _pipeline(config, plan, found)
    trained = sum(parameter.numel for parameter in anatomy.parameters() if parameter.trainable)
    if trained < anatomy.numel:
        yield from _frozen(plan, anatomy, trained, param)
    yield from _states(
        plan,
        "P" if trained == anatomy.numel else "T",
        trained,
        master,
        param,
        added=BYTES[accumulating(config)],
        gradients=ask_update(config.optimizer).GRADIENTS,
    )
    yield _optimizer(config, plan, anatomy)
    yield (
        f"activations, loss, backward: traced at micro_batch_size {plan.batch.micro_batch_size} x seq_len"
        f" {plan.batch.seq_len // plan.degree(CONTEXT)} by running the model's own code on fake tensors, and repeated"
        f" for {len(anatomy.layers)} layers; activation checkpointing {config.train.activation_checkpointing}"
    )
    if config.train.compile and partitions(plan):
        yield (
            "compiled layers keep what the graph of their forward hands to that of their backward, cut by inductor's"
            " own partitioner; what one kernel joins is not known, so that one layer's intermediate results count"
        )
    elif config.train.compile and config.train.activation_checkpointing is not Checkpointing.full:
        yield (
            "compiled layers around collectives are traced as eager ones; the lower end of the range counts"
            f" {COMPILED_KEEPS} of their activations"
        )
    for name, part in found.profile.parts.items():
        forward = [_kept(entry) for (phase, _), steps in part.trace.sections.items() if phase == "f" for entry in steps]
        yield (
            f"traced part: {name.split()[0]}, {len(part.trace.templates)} layers, {sum(forward) / GIB:.3f} GiB"
            " allocated by its forward"
        )
    if plan.device == "cuda":
        yield from _on_the_gpu(config, plan, found)


def _on_the_gpu(config: Config, plan: Plan, found: Estimate) -> Iterator[str]:
    """What is assumed of it besides what the step allocates."""
    rank = found.busiest
    waste = rank.peak_reserved_bytes - rank.peak_allocated_bytes
    segments = "segments that grow" if found.device.expandable_segments else "segments of 2 MiB, 20 MiB or the request"
    yield (
        f"reserved = allocated + {waste / GIB:.2f} GiB: the same requests replayed through the rules of the CUDA"
        f" caching allocator (512-byte rounding, best fit, a pool per stream; {segments}): the lower end of the range"
    )
    yield (
        f"the upper end of reserved and device: {ABOVE[found.device.expandable_segments]:.2f} x what the replay needs"
        " of the device, the most that public runs show above it: fragmentation that a replay does not see"
    )
    if found.device.gpu is not None:
        yield (
            f"cuBLAS: {CUBLAS_HANDLES} workspaces of {cublas_bytes(found.device.gpu):,} bytes (forward and backward"
            " threads), torch's default sizes; inside allocated"
        )
    yield (
        f"CUDA context {found.context_bytes / GIB:.2f} GiB: assumed, seen 0.4 to 1.0 (estimate.context_gib); NCCL"
        f" {communicators(plan)} communicator(s) x {config.estimate.nccl_gib} GiB: assumed, seen 0.1 to 0.5"
        " (estimate.nccl_gib)"
    )
    yield "not counted: other processes on the GPU, kernels' private scratch memory, data that the loader prefetches"


def _pipeline(config: Config, plan: Plan, found: Estimate) -> Iterator[str]:
    pipeline, pp = config.parallel.pipeline, plan.degree(PIPELINE)
    shape: dict[str, Any] = dict(pp=pp, micro_batches=plan.batch.gradient_accumulation_steps)
    shape["stages_per_rank"] = pipeline.stages_per_rank
    layers = [len(owned) for owned in stage_layers(config, plan, found.profile.outline)]
    yield f"stages of {layers} layers (parallel.pipeline.split, or balanced by multiply-adds); tied ones at both ends"
    held, buffers = in_flight(pipeline.schedule, **shape), receive_buffers(pipeline.schedule, **shape)
    yield (
        f"{pipeline.schedule}: micro-batches whose activations are held at once, by rank {{stage: count}}: {held};"
        f" buffers for what neighbours send: {buffers}; from the schedule's own order"
    )
    yield "gradients stay whole and parameters gathered until a step's last backward"


def _frozen(plan: Plan, anatomy: Anatomy, trained: int, param: int) -> Iterator[str]:
    """What adapters leave as it is."""
    codes = [parameter for parameter in anatomy.parameters() if parameter.packed]
    packed = sum(parameter.numel for parameter in codes)
    frozen = anatomy.numel - trained - packed
    ranks = plan.parameter_shards
    divided = f" / {ranks}" if ranks > 1 else ""
    yield f"T = {trained:,} of them are trained, the adapters: gradients and optimizer states are of these alone"
    yield f"F = {frozen:,} stay as they are: {param} B x F{divided} = {param * frozen / ranks / GIB:.2f} GiB"
    if packed:
        scales = sum(size for parameter in codes for size in parameter.packed[1:])
        yield (
            f"Q = {packed:,} in 4 bits: codes 0.5 B x Q{divided} = {packed / 2 / ranks / GIB:.2f} GiB, and"
            f" {scales / GIB:.2f} GiB of scales, whole on every rank"
        )


def _states(
    plan: Plan, which: str, numel: int, master: int, param: int, *, added: int, gradients: bool
) -> Iterator[str]:
    """which: the letter for the number of parameters that have states. added: width of the gradients that add up.
    gradients: whether they are kept."""
    shard = plan.fsdp_size
    kept, each = ("parameters and gradients", " each") if gradients else ("parameters", "")
    if plan.engine is EngineName.deepspeed:
        parts = [
            f"parameters {param} B x {which}" + (f" / {shard}" if plan.zero_stage == 3 else ""),
            f"gradients {added} B x {which}" + (f" / {shard}" if plan.zero_stage > 1 else ""),
            f"master weights {master} B x {which} / {shard}",
        ]
        yield "; ".join(parts) + ": DeepSpeed's partitions, padded, with the buckets of its generated configuration"
    elif plan.fully_sharded:
        size = (
            f" = {numel * master / shard / GIB:.2f} GiB{each}" if plan.degree(PIPELINE) == 1 else ", of its own stages"
        )
        yield (
            f"{kept} {master} B x {which} / {shard}{size} (ceil(rows / {shard}) rows of every"
            f" matrix and vector); gathered copies {param} B, reduced in {BYTES[plan.reduce_dtype]} B"
        )
    else:
        size = f"{numel * master / GIB:.2f} GiB"
        yield f"{kept} {master} B x {which} = {size}{each}, whole on every rank"


def _optimizer(config: Config, plan: Plan, anatomy: Anatomy) -> str:
    """Temporaries are those of a rank that holds the parameters of this table, all at once."""
    chosen, settings = ask(config.optimizer), config.optimizer
    held = [Held(whole=p.whole, shape=p.shape) for p in anatomy.parameters() if p.trainable and len(p.shape) > 1]
    update = ask_update(settings)
    said = f"; {update.description(config)}" if update.description(config) else ""
    if not update.GRADIENTS:
        held = sorted(held, key=lambda one: one.piece.numel)[-1:]
    needed = chosen.temporaries(held, settings, plan.master_dtype, Spread())
    return (
        f"optimizer {settings.name}, {settings.implementation}: {chosen.description(settings)}, from the end of step 1;"
        f" temporaries {needed / GIB:.3f} GiB where nothing is sharded{said}"
    )


def _kept(entry: tuple[object, ...]) -> int:
    return entry[2] if entry[0] == "+" and isinstance(entry[2], int) else 0
