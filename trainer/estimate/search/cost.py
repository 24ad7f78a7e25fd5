"""The predicted time of one step of a plan: a model made of a few stated terms, not a measurement.

    matmuls                FLOPs / (peak * estimate.efficiency), at least the time to read the weights from memory
    around them            norms, residuals, rotations, activation functions: bytes read and written / bandwidth
    unpacking              4-bit weights read, and written as they are multiplied, at each use
    recompute              what activation checkpointing computes a second time
    tensor parallel        four sums of the hidden states per layer and micro-batch; nothing hides them
    context parallel       keys and values, or heads, exchanged around attention
    expert parallel        tokens to the ranks of their experts and back, at even routing
    sharding, gradients    gathers and reductions over the data-parallel ranks, behind the computation as far as it goes
    pipeline               waiting (`plan.bubble`) and handing on hidden states
    update                 optimizer states read and written where they live; the way there and back; matmuls

It ranks layouts, for which the differences between terms count; the constants below are its assumptions.
tests/benchmarks/published.py measures its distance from published runs. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from configs.choices import BYTES, Attention, Checkpointing, EngineName, OffloadDevice
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer import linear
from trainer.axes import CONTEXT, EXPERTS, PIPELINE, REPLICATE, SENDING, SHARD, TENSOR
from trainer.estimate.profile import Outline
from trainer.estimate.search.network import Network, build_network, group_of
from trainer.flops import Flops, flops
from trainer.optim.protocol import Work
from trainer.optim.table import ask, kept_bytes, paged_bytes
from trainer.plan.devices import GB_PER_SECOND, Gpu
from trainer.plan.model_fields import attention_width, head_width, keys_seen, sizes
from trainer.plan.plan import Plan
from trainer.plan.traffic import LayerWork
from trainer.plan.views import EXPERT
from trainer.update import ask as ask_update

NOTHING = Work()
MEMORY_ACHIEVED = 0.8
"""The part of the data sheet's memory bandwidth that kernels reach which only read and write."""
WHOLE, DIVIDED = {False: 38.0, True: 10.0}, {False: 28.0, True: 14.0}
"""Hidden-state-sized tensors that one layer's forward reads and writes outside its matmuls, in eager torch and
compiled: whole ones (two norms, which compute in float32, and two residuals), and those that tensor parallel divides
(rotation, activation function, product). A backward moves twice as many."""
LOGIT_BYTES = 30.0
"""Read and written per logit by cast, softmax, loss and their gradients."""
HIDDEN, EXPOSED = 0.8, 0.05
"""HIDDEN: fraction of the computation that can hide communication. EXPOSED: fraction of communication that always
shows."""
UPDATE_BYTES = 14.0
"""Bytes per parameter: master weight read and written, gradient read, copy written; and each state read and written."""
SELECTIVE = 0.5
"""The part of the forward's matmuls that is computed again: every second one; all work around them is."""
HOST_MEMORY_GB_PER_SECOND = 20.0
"""The share of its node's memory bandwidth that a GPU has for updates on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """Sizes of a decoder. attention: heads * head_dim; key_value: the same of keys. spans, scores: see `Outline`.
    matrices: parameters that take part in a matmul (all but a look-up table, and of routed experts those that a token
    goes to). frozen: parameters that are not trained; frozen_matrices: those of `matrices` whose own gradient is left
    out; packed: those that are held in `packed_bytes` of other tensors. experts: routed ones of a layer, of which a
    token goes to `chosen`; in_experts, frozen_experts: parameters of theirs that are trained, and that are not.
    kept_bytes: the optimizer's states, in float32; paged_bytes: those of them that a full GPU leaves to its host.
    update: its work on all parameters; update_largest: FLOPs of the largest. float8: sides of the matrices that one
    process would multiply in float8."""

    parameters: int
    matrices: int
    layers: int
    hidden: int
    attention: int
    key_value: int
    vocabulary: int
    spans: tuple[int | None, ...]
    scores: bool = False
    frozen: int = 0
    frozen_matrices: int = 0
    packed: int = 0
    packed_bytes: int = 0
    experts: int = 0
    chosen: int = 0
    in_experts: int = 0
    frozen_experts: int = 0
    kept_bytes: int = 0
    paged_bytes: int = 0
    update: Work = NOTHING
    update_largest: float = 0.0
    float8: tuple[tuple[int, ...], ...] = ()

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen

    def frozen_bytes(self, width: int) -> int:
        """width: bytes of a value that is not packed."""
        return (self.frozen - self.packed) * width + self.packed_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """seconds: by term, in the order of the module's table; only those that are not zero. tokens: of all ranks."""

    seconds: Mapping[str, float]
    tokens: int
    world_size: int
    mfu: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens / self.total / self.world_size


def dimensions(fields: Mapping[str, Any], outline: Outline, settings: Settings) -> Dimensions:
    """Sizes from the Hugging Face config's fields, which tell width and vocabulary, and the counted parameters."""
    known, anatomy = sizes(fields), outline.anatomy
    hidden, heads, vocabulary = known.hidden or 1, known.heads or 1, known.vocabulary or 1
    tied = "head" not in dict(anatomy.groups)
    table = 0 if tied else vocabulary * hidden
    frozen = [parameter for parameter in anatomy.parameters() if not parameter.trainable]
    packed = [parameter for parameter in frozen if parameter.packed]
    trained = [parameter.whole for parameter in anatomy.parameters() if parameter.trainable]
    every = [parameter.whole for parameter in anatomy.parameters()]
    chosen, experts = next((about.routed for about in every if about.routed), (0, 0))
    in_experts = sum(about.numel for about in trained if about.view == EXPERT)
    works = [ask(settings).work(about, settings) for about in trained]
    return Dimensions(
        parameters=anatomy.numel,
        matrices=anatomy.active - table,
        layers=len(anatomy.layers),
        hidden=hidden,
        attention=attention_width(fields),
        key_value=(known.key_value_heads or heads) * head_width(fields),
        vocabulary=vocabulary,
        spans=outline.spans,
        scores=outline.scores,
        frozen=sum(parameter.numel for parameter in frozen),
        frozen_matrices=max(0, sum(parameter.active for parameter in frozen) - table),
        packed=sum(parameter.numel for parameter in packed),
        packed_bytes=sum(sum(parameter.packed) for parameter in packed),
        experts=experts,
        chosen=chosen,
        in_experts=in_experts,
        frozen_experts=sum(about.numel for about in every if about.view == EXPERT) - in_experts,
        kept_bytes=kept_bytes(trained, settings, "float32"),
        paged_bytes=paged_bytes(trained, settings, "float32"),
        update=Work(flops=sum(one.flops for one in works), exchanged=sum(one.exchanged for one in works)),
        update_largest=max((one.flops for one in works), default=0.0),
        float8=tuple(parameter.shape for parameter in anatomy.parameters() if parameter.eight_bits),
    )


def step_time(config: Config, plan: Plan, size: Dimensions, gpu: Gpu) -> StepTime:
    """Predict the seconds of one optimizer step. The pipeline's stages are taken to be even."""
    seconds = _Step(config, plan, size, gpu).terms()
    work = _flops(config, plan, size)
    useful, peak = plan.batch.tokens * work.step(config), plan.world_size * _peak(config, plan, gpu, work)
    return StepTime(
        seconds={name: value for name, value in seconds.items() if value},
        tokens=plan.batch.tokens,
        world_size=plan.world_size,
        mfu=useful / (peak * sum(seconds.values())),
    )


def _flops(config: Config, plan: Plan, size: Dimensions) -> Flops:
    """In float8 are the matrices that tensor parallel leaves large enough."""
    multiplied = linear.eight_bits(config)
    return flops(
        matrices=size.matrices,
        attention=size.attention,
        keys=keys_seen(size.spans, plan.batch.seq_len),
        frozen=size.frozen_matrices,
        float8=sum(map(prod, multiplied.converted(size.float8))) if multiplied else 0,
    )


def _peak(config: Config, plan: Plan, gpu: Gpu, work: Flops) -> float:
    return work.peak(config, plan, gpu) or gpu.float32_flops


class _Step:
    """One rank's step. Times are of one micro-batch unless their name says step."""

    def __init__(self, config: Config, plan: Plan, size: Dimensions, gpu: Gpu) -> None:
        self.config, self.plan, self.size, self.gpu = config, plan, size, gpu
        self.network: Network = build_network(config, gpu, plan.gpus_per_node)
        self.tp, self.pp, cp = plan.degree(TENSOR), plan.degree(PIPELINE), plan.degree(CONTEXT)
        self.tokens = plan.batch.micro_batch_size * plan.batch.seq_len / cp
        self.layers = size.layers / self.pp
        self.width = BYTES[plan.param_dtype]
        self.ep = plan.degree(EXPERTS)
        # What data parallel shards or copies: bytes as they are gathered, and the parameters that are trained. Experts
        # that are divided have a view of their own.
        apart, frozen = (size.in_experts, size.frozen_experts) if self.ep > 1 else (0, 0)
        whole = (size.trained - apart - frozen) * self.width + size.frozen_bytes(self.width)
        self.held = whole / (self.tp * self.pp)
        multiplied = linear.eight_bits(config)
        narrow = multiplied.converted(size.float8) if multiplied and multiplied.gathered else []
        self.gathered = self.held - sum(map(prod, narrow)) * (self.width - 1) / (self.tp * self.pp)
        self.trained = (size.trained - apart) / (self.tp * self.pp)
        self.in_experts = apart / (self.ep * self.pp)
        self.experts = (apart + frozen) / (self.ep * self.pp)
        self.bandwidth = gpu.memory_bandwidth * MEMORY_ACHIEVED
        self.micro_batches = plan.batch.gradient_accumulation_steps
        self.recompute = config.train.activation_checkpointing
        self.passes = ask_update(config.optimizer).passes(config)
        self.peak = _peak(config, plan, gpu, _flops(config, plan, size)) * config.estimate.efficiency

    def terms(self) -> dict[str, float]:
        products, around, times = self._products(), self._around(), self.micro_batches
        again, unpacking = self._recompute(products, around), self._unpacking()
        tensor, context = self._inside_layers(TENSOR), self._inside_layers(CONTEXT)
        experts = self._inside_layers(EXPERTS) if self.ep > 1 else 0.0
        forwards, backwards = self.passes.forwards, self.passes.backwards
        every = forwards * products + backwards * max(products, 2 * products - self._left_out())
        around, again = (forwards + 2 * backwards) * around, backwards * again
        busy = every + around + unpacking + again + tensor + context + experts
        return {
            "matmuls": every * times,
            "around them": around * times,
            "unpacking": unpacking * times,
            "recompute": again * times,
            "tensor parallel": tensor * times,
            "context parallel": context * times,
            "expert parallel": experts * times,
            "sharding, gradients": self._step_sharding(busy),
            "pipeline waits": busy * times * self.plan.bubble / (1 - self.plan.bubble),
            "pipeline sends": self._sends() * times,
            "update": self._step_update(),
        }

    def _products(self) -> float:
        """Time of the forward's matmuls."""
        attention = 4.0 * self.size.attention * self._keys()
        read = self.held + self.experts * self.width
        return max(self._multiplying(2.0 * self.size.matrices + attention), read / self.bandwidth)

    def _keys(self) -> float:
        """Keys that attention multiplies with a token, on average, in all layers together."""
        length, spans = self.plan.batch.seq_len, self.size.spans
        if self.config.model.attention is Attention.flash_attention_2:
            return sum(_mean_seen(length, span) for span in spans)
        if self.size.scores:
            return float(length * len(spans))
        # torch's kernel skips the masked half for a plain causal mask alone. A window is a mask, which skips nothing.
        return sum(length / 2 if span is None or span > length else float(length) for span in spans)

    def _left_out(self) -> float:
        """Time of the backward's gradients of frozen matrices themselves."""
        return self._multiplying(2.0 * self.size.frozen_matrices)

    def _multiplying(self, flops_per_token: float) -> float:
        return flops_per_token * self.tokens / (self.tp * self.pp) / self.peak

    def _unpacking(self) -> float:
        """Time in the forward, in the backward, and in the recomputation."""
        again = {Checkpointing.none: 0.0, Checkpointing.selective: SELECTIVE, Checkpointing.full: 1.0}[self.recompute]
        moved = (self.size.packed_bytes + self.size.packed * self.width) / (self.tp * self.pp)
        return (self.passes.forwards + (1 + again) * self.passes.backwards) * moved / self.bandwidth

    def _around(self) -> float:
        """Time of everything else in the forward, with a third of the loss, which is here for forward and backward."""
        compiled = self.config.train.compile
        whole = WHOLE[compiled] / (self.tp if self.config.parallel.sequence_parallel else 1)
        moved = (whole + DIVIDED[compiled] / self.tp) * self.size.hidden * self.width * self.layers
        logits = LOGIT_BYTES / 3 * self.size.vocabulary / (self.tp * self.pp)
        return self.tokens * (moved + logits) / self.bandwidth

    def _recompute(self, products: float, around: float) -> float:
        if self.recompute is Checkpointing.none:
            return 0.0
        return (products if self.recompute is Checkpointing.full else SELECTIVE * products) + around

    def _inside_layers(self, axis: str) -> float:
        """Time of the messages along an axis in all layers; nothing hides it."""
        size, again = self.size, self.recompute
        work = LayerWork(
            tokens=self.tokens,
            hidden=size.hidden * self.width,
            attention=size.attention * self.width,
            key_value=size.key_value * self.width,
            experts=size.experts,
            chosen=size.chosen,
            forwards=1 if again is Checkpointing.none else 2,
            partly=again is Checkpointing.selective,
        )
        sent = SENDING[axis](self.config, work)
        collective = getattr(self.network, sent.how)
        both = (self.passes.forwards + self.passes.backwards) / 2
        return both * sent.times * self.layers * collective(sent.size_bytes, group_of(self.plan, axis))

    def _step_sharding(self, busy: float) -> float:
        """Time of the exchange between the data-parallel ranks in a step, without the part that the computation
        hides."""
        plan, network, times = self.plan, self.network, self.micro_batches
        gradients = self.trained * BYTES[plan.reduce_dtype]
        if plan.engine is EngineName.deepspeed:
            group = group_of(plan, SHARD)
            scatter = network.gather(gradients, group)
            if plan.zero_stage == 3:
                return times * _exposed(2 * network.gather(self.held, group) + scatter, busy)
            # Stages 1 and 2 wait for their collectives: nothing runs at the same time.
            return (times if plan.zero_stage == 2 else 1) * scatter + network.gather(self.trained * self.width, group)
        forwards, backwards = self.passes.forwards, self.passes.backwards
        copies = backwards * network.all_reduce(gradients / plan.fsdp_size, group_of(plan, REPLICATE))
        if plan.fsdp_size == 1:
            return _exposed(copies, 2 / 3 * busy)
        group = group_of(plan, SHARD, CONTEXT)
        gather, scatter = network.gather(self.gathered, group), backwards * network.gather(gradients, group)
        if self.experts:
            group = group_of(plan, *plan.view(EXPERT).sharding)
            gather += network.gather(self.experts * self.width, group)
            scatter += backwards * network.gather(self.in_experts * BYTES[plan.reduce_dtype], group)
        if self.pp > 1:
            gathers = (forwards + backwards) * times if plan.reshard_after_forward else 1
            return _exposed(gathers * gather + scatter + copies, times * busy)
        gathers = forwards + backwards if plan.reshard_after_forward else forwards
        return times * _exposed(gathers * gather + scatter, busy) + _exposed(copies, busy)

    def _sends(self) -> float:
        """Time to send hidden states to the next stage and their gradients back, at each boundary of this rank."""
        boundaries = self.config.parallel.pipeline.stages_per_rank or 1
        size = self.tokens * self.size.hidden * self.width
        return (
            (self.passes.forwards + self.passes.backwards)
            * boundaries
            * self.network.send(size, group_of(self.plan, PIPELINE))
        )

    def _step_multiplying(self) -> float:
        """Time of an update that multiplies whole matrices: each on one rank, which gathers it and sends the result
        back."""
        plan, work = self.plan, self.size.update
        if not work.flops:
            return 0.0
        plain = self.gpu.peak_flops(plan.param_dtype, tf32=self.config.precision.tf32) or self.gpu.float32_flops
        peak = plain * self.config.estimate.efficiency
        group = group_of(plan, SHARD, CONTEXT)
        sent = self.network.all_to_all(work.exchanged / (self.tp * self.pp * group.size), group)
        return max(work.flops / plan.world_size, self.size.update_largest) / peak + sent

    def _step_update(self) -> float:
        """Time to read and write the optimizer states of this rank's share where they are."""
        plan, disk = self.plan, self.config.cluster.nvme_gb_per_second * GB_PER_SECOND
        shards = plan.degree(SHARD) if plan.engine is EngineName.deepspeed else plan.fsdp_size
        own = self.trained / shards + self.in_experts / plan.view(EXPERT).shards
        kept, fetched = self.size.kept_bytes / 4 / max(1, self.size.trained), 0.0
        touched = own * update_bytes(self.size)
        if plan.offload_parameters is not OffloadDevice.none:
            speed = disk if plan.offload_parameters is OffloadDevice.nvme else self.network.host
            fetched = 2 * self.micro_batches * self.held / shards / min(speed, self.network.host)
        if plan.offload_optimizer is OffloadDevice.none:
            # The GPU is assumed to be full: paged states come from the host for each update, and go back.
            paged = own * 2 * self.size.paged_bytes / max(1, self.size.trained) / self.network.host
            return touched / self.bandwidth + fetched + paged + self._step_multiplying()
        moved = own * (BYTES[plan.reduce_dtype] + self.width) / self.network.host
        computed = touched / (HOST_MEMORY_GB_PER_SECOND * GB_PER_SECOND)
        swapped = own * 2 * 4 * (1 + kept) / disk if plan.offload_optimizer is OffloadDevice.nvme else 0.0
        return moved + computed + swapped + fetched


def update_bytes(size: Dimensions) -> float:
    """Bytes per updated parameter: each byte of a state is read and written."""
    return UPDATE_BYTES + 2 * size.kept_bytes / max(1, size.trained)


def _mean_seen(length: int, span: int | None) -> float:
    """Keys that a token sees on average: the first tokens of a sequence have fewer predecessors than a window holds."""
    held = length if span is None else min(span, length)
    return held * (1 - held / (2 * length))


def _exposed(communication: float, computation: float) -> float:
    """The part of communication that shows although it runs during the computation."""
    return max(communication - HIDDEN * computation, EXPOSED * communication)
