"""Config and plan in, bytes of each kind of rank out: `estimate(config, plan)`.

    profile (trace of the model's units)  +  layout (what the engine adds)  ->  timeline  ->  Estimate

It needs no GPU, no weights and no network, and after the first call for a shape neither torch nor transformers. The
trainer, the launcher and the command `memory-estimate` call the same function.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from configs.choices import Checkpointing, EngineName
from configs.schema import Config
from trainer.axes import PIPELINE
from trainer.engine.deepspeed.config import deepspeed_config
from trainer.estimate.bounds import partitions
from trainer.estimate.compose import Layout, replay, replay_validation
from trainer.estimate.layouts.common import Setting, step_inputs
from trainer.estimate.layouts.deepspeed import zero_layout
from trainer.estimate.layouts.replicated import Replicated
from trainer.estimate.layouts.sharded import FullySharded
from trainer.estimate.layouts.zero import model_size
from trainer.estimate.pipelined import PipelineRank
from trainer.estimate.profile import ModelProfile
from trainer.estimate.profiles import get_profile, stage_layers
from trainer.estimate.timeline import COMPONENTS, Moment, Timeline
from trainer.estimate.verdict import ABOVE, COMPILED_KEEPS, Ends, Verdict, judge
from trainer.model.resize import settle_vocabulary
from trainer.optim.table import ask as ask_optimizer
from trainer.plan.devices import Gpu, find_gpu
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan
from trainer.update import ask

GIB = 2**30
ASSUMED_GPU, ASSUMED_GPUS_PER_NODE = "H100-SXM", 8
# cuBLAS: one workspace per stream that computes, the forward's and the backward's; larger since Hopper.
CUBLAS_BYTES, CUBLAS_HOPPER_BYTES, CUBLAS_HANDLES = 8_519_680, 32 * 2**20, 2
HOPPER_AND_LATER = ("H", "GH", "B", "GB")  # as their names begin


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetDevice:
    """The device that the estimate is compared with.

    capacity_bytes: None on the CPU.
    expandable_segments: the setting of its allocator.
    assumed: the configuration does not name it."""

    name: str
    capacity_bytes: int | None
    gpu: Gpu | None
    expandable_segments: bool
    assumed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """One kind of rank.

    components: bytes at the moment of the peak, in the order of `COMPONENTS`; their sum is peak_allocated_bytes.
    highest: the most that each component ever holds, each at a moment of its own.
    peak_reserved_bytes: the allocator's segments. device_bytes: with CUDA context and NCCL, the number in nvidia-smi.
    Both are lower ends, and their `_most_` fields the upper ones (`verdict`).
    between_steps_bytes: allocated when an update is done.
    curve: the timeline, one moment per layer and phase of the first two steps."""

    kind: str
    count: int
    components: dict[str, int]
    highest: dict[str, int]
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_reserved_most_bytes: int
    device_bytes: int
    device_most_bytes: int
    host_bytes: int
    nvme_bytes: int
    peak_phase: str
    peak_step: int
    between_steps_bytes: int
    curve: tuple[Moment, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """context_bytes, nccl_bytes: assumed, per GPU (`estimate.context_gib`, `estimate.nccl_gib`)."""

    ranks: tuple[RankEstimate, ...]
    device: TargetDevice
    context_bytes: int
    nccl_bytes: int
    profile: ModelProfile

    @property
    def busiest(self) -> RankEstimate:
        return max(self.ranks, key=lambda rank: (rank.device_bytes, rank.peak_allocated_bytes))

    def of_rank(self, plan: Plan, rank: int) -> RankEstimate:
        """The estimate of the kind of rank to which a rank belongs: under a pipeline the kinds are pp0, pp1, ... by
        stage."""
        stage = f"{PIPELINE}{plan.coordinates(rank)[PIPELINE]}"
        return next((kind for kind in self.ranks if kind.kind == stage), self.ranks[0])

    @property
    def busiest_place(self) -> int:
        """The rank's place in the pipeline; 0 without one."""
        return int(self.busiest.kind.removeprefix(PIPELINE)) if self.busiest.kind.startswith(PIPELINE) else 0

    @property
    def margin_bytes(self) -> int | None:
        """Bytes that the lower end of the busiest rank leaves free; negative: the bytes that it lacks."""
        capacity = self.device.capacity_bytes
        return None if capacity is None else capacity - self.busiest.device_bytes

    @property
    def verdict(self) -> Verdict:
        return judge(self.busiest.device_bytes, self.busiest.device_most_bytes, self.device.capacity_bytes)

    @property
    def fits(self) -> bool:
        """Whether the upper end fits; true without a device to compare with."""
        return self.verdict in (Verdict.fits, Verdict.unknown)

    @property
    def too_large(self) -> bool:
        """Whether even the lower end is too large."""
        return self.verdict is Verdict.does_not_fit


def planned_machine(config: Config, found: Machine) -> Machine:
    """The machine that the configuration describes: `cluster.gpu`, `cluster.gpu_memory_gib` or `cluster.nodes` may name
    one that is not this machine. With none of them and no visible GPU, nodes of eight GPUs are assumed."""
    described = config.cluster.gpus_per_node or found.gpus or ASSUMED_GPUS_PER_NODE
    return Machine(gpus=described)


def on_part_of_the_cluster(config: Config, machine: Machine) -> Config:
    """The configuration on no more GPUs than its degrees take. A comparison of layouts on one cluster includes some
    that fill a part of it (parallel=tensor: 2 GPUs), which the trainer would refuse to spread over all of them."""
    parallel, cluster = config.parallel, config.cluster
    degrees = (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)
    needed = prod(degree or 0 for degree in degrees)
    if not 1 < needed < cluster.nodes * machine.gpus or (needed > machine.gpus and needed % machine.gpus):
        return config
    nodes = max(1, needed // machine.gpus)
    return replace(config, cluster=replace(cluster, nodes=nodes, gpus_per_node=needed // nodes))


def planned_device(config: Config, plan: Plan, *, found_gpu: str | None = None) -> TargetDevice:
    """The device of the verdict. found_gpu: torch's name of this machine's GPU, if there is one."""
    if plan.device != "cuda":
        return TargetDevice(name="cpu", capacity_bytes=None, gpu=None, expandable_segments=False)
    named = config.cluster.gpu or found_gpu
    gpu = find_gpu(named) if named else None
    memory = config.cluster.gpu_memory_gib
    assumed = gpu is None
    gpu = gpu or find_gpu(ASSUMED_GPU)
    assert gpu is not None
    if memory is not None:
        return TargetDevice(
            name=gpu.name if not assumed else f"{memory:g} GiB GPU",
            capacity_bytes=int(memory * GIB),
            gpu=gpu,
            expandable_segments=config.cluster.expandable_segments,
            assumed=assumed,
        )
    return TargetDevice(
        name=gpu.name,
        capacity_bytes=gpu.memory_bytes,
        gpu=gpu,
        expandable_segments=config.cluster.expandable_segments,
        assumed=assumed,
    )


def estimate(
    config: Config,
    plan: Plan,
    *,
    found_gpu: str | None = None,
    profile: ModelProfile | None = None,
    places: Collection[int] | None = None,
    heaviest: bool = False,
    alone: int | None = None,
) -> Estimate:
    """Predict the memory of the plan's ranks.

    found_gpu: see `planned_device`.
    profile: instead of the one on disk.
    places: pipeline ranks to estimate, from 0.
    heaviest: skip pipeline ranks of which another holds at least as much.
    alone: see `get_profile`.

    Raises NotEstimated for a model whose code cannot be traced, and the errors of building the model (ConfigError,
    DataError).
    """
    settle_vocabulary(config)
    device = planned_device(config, plan, found_gpu=found_gpu)
    profile = profile or get_profile(config, plan, device.gpu, alone=alone)
    gpu = plan.device == "cuda"
    context = int(config.estimate.context_gib * GIB) if gpu else 0
    nccl = int(config.estimate.nccl_gib * GIB) * communicators(plan) if gpu else 0
    ends = Ends(
        outside=context + nccl,
        above=ABOVE[device.expandable_segments] if gpu else 1.0,
        spared=0.0 if _traced_as_it_runs(config, plan) else 1 - COMPILED_KEEPS,
    )
    if plan.degree(PIPELINE) > 1:
        ranges = stage_layers(config, plan, profile.outline)
        places = places or range(plan.degree(PIPELINE))
        stages = {place: PipelineRank(config, plan, profile, ranges, place) for place in places}
        if heaviest:
            stages = {place: rank for place, rank in stages.items() if not _exceeded(place, stages)}
        ranks = _estimate_stages(plan, stages, device, ends)
    else:
        averages = config.train.eval_samples > 0 and ask_optimizer(config.optimizer).average(config.optimizer)
        forwards = get_profile(config, plan, device.gpu, alone=alone, evaluation=True) if averages else None
        ranks = (_estimate_whole(config, plan, profile, device, ends, forwards),)
    return Estimate(ranks=ranks, device=device, context_bytes=context, nccl_bytes=nccl, profile=profile)


def _estimate_whole(
    config: Config, plan: Plan, profile: ModelProfile, device: TargetDevice, ends: Ends, alone: ModelProfile | None
) -> RankEstimate:
    """The memory of a rank without a pipeline; all ranks hold the same. alone: of a validation's forwards, where they
    need more than steps do."""
    timeline = _begin(plan, device)
    module = profile.stage(range(len(profile.anatomy.layers)), stages=1, index=0)
    passes = ask(config.optimizer).passes(config)
    setting = Setting(profile=module, plan=plan, optimizer=config.optimizer, timeline=timeline, passes=passes)
    count = plan.batch.gradient_accumulation_steps
    layout = _layout(config, setting)
    replay(module, layout, timeline, micro_batches=count, inputs=step_inputs(plan))
    if alone is not None:
        replay_validation(alone.stage(range(len(alone.anatomy.layers)), stages=1, index=0), layout, timeline)
    return _read(plan, timeline, setting, ends, kind="all")


def _exceeded(place: int, ranks: Mapping[int, PipelineRank]) -> bool:
    """Whether another rank holds all that this one does; of two that hold the same, the first stays."""
    rank = ranks[place]
    others = ((number, other) for number, other in ranks.items() if number != place and other.contains(rank))
    return any(number < place or not rank.contains(other) for number, other in others)


def _estimate_stages(
    plan: Plan, stages: Mapping[int, PipelineRank], device: TargetDevice, ends: Ends
) -> tuple[RankEstimate, ...]:
    """The estimates of all places in the pipeline. Places with the same work are replayed once."""
    known, ranks = dict[Hashable, RankEstimate](), []
    for pp_rank, rank in stages.items():
        if rank.work not in known:
            timeline, setting = rank.replay(partial(_begin, plan, device))
            known[rank.work] = _read(plan, timeline, setting, ends, kind=f"{PIPELINE}{pp_rank}")
        ranks.append(replace(known[rank.work], kind=f"{PIPELINE}{pp_rank}"))
    return tuple(ranks)


def _begin(plan: Plan, device: TargetDevice) -> Timeline:
    timeline = Timeline(gpu=plan.device == "cuda", expandable=device.expandable_segments)
    if device.gpu is not None:
        for _ in range(CUBLAS_HANDLES):
            timeline.allocate("workspace", cublas_bytes(device.gpu))
    return timeline


def _traced_as_it_runs(config: Config, plan: Plan) -> bool:
    """Whether compiled layers are traced as compiled; those around collectives are traced as eager and keep less."""
    kept = config.train.activation_checkpointing is not Checkpointing.full
    return not (config.train.compile and kept and not partitions(plan))


def _read(plan: Plan, timeline: Timeline, setting: Setting, ends: Ends, *, kind: str) -> RankEstimate:
    components = dict[str, int](zip(COMPONENTS, timeline.peak.parts, strict=True))
    lower, upper = ends.device(timeline.peak_reserved, components["activations"])
    return RankEstimate(
        kind=kind,
        count=plan.world_size // plan.degree(PIPELINE),
        components=components,
        highest=dict(zip(COMPONENTS, timeline.highest, strict=True)),
        peak_allocated_bytes=timeline.peak.total,
        peak_reserved_bytes=lower - ends.outside,
        peak_reserved_most_bytes=upper - ends.outside,
        device_bytes=lower,
        device_most_bytes=upper,
        host_bytes=sum(setting.host.values()),
        nvme_bytes=sum(setting.nvme.values()),
        peak_phase=timeline.peak.phase,
        peak_step=timeline.peak.step,
        between_steps_bytes=timeline.allocated,
        curve=tuple(timeline.curve),
    )


def communicators(plan: Plan) -> int:
    """NCCL communicators of a rank: one of the world and one for each mesh axis with another group; plus one
    for the fewer ranks that FSDP2's backward gathers from."""
    if plan.world_size == 1:
        return 0
    axes = [axis for axis, size in plan.mesh.items() if size > 1]
    fewer = plan.fsdp.reshard_size is not None and plan.fsdp.reshard_size < plan.fsdp_size
    return 1 + (len(axes) + fewer if plan.fully_sharded else 0)


def cublas_bytes(gpu: Gpu) -> int:
    return CUBLAS_HOPPER_BYTES if gpu.name.startswith(HOPPER_AND_LATER) else CUBLAS_BYTES


def with_micro_batch(plan: Plan, size: int) -> Plan:
    """The same plan with another micro-batch size (and so another global batch)."""
    return replace(plan, batch=replace(plan.batch, micro_batch_size=size))


def _layout(config: Config, setting: Setting) -> Layout:
    plan = setting.plan
    if plan.engine is EngineName.deepspeed:
        settings = deepspeed_config(config, plan, model_size(setting.profile.anatomy), swap_folder="")
        return zero_layout(setting, settings)
    return FullySharded(setting) if plan.fully_sharded else Replicated(setting)
