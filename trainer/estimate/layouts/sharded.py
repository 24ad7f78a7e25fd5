"""FSDP2, also with replicas and over one rank: when parameters are gathered, and where gradients pass through.

    gather    shard cast to param_dtype -> all-gather output -> a whole copy of each parameter; the output of the last
              gathering of a forward stays until the next one (their copies may overlap)
    backward  each group, as it begins, starts the gathering of the next one
    `parallel.fsdp`  further groups gathered ahead; between forward and backward a part that fewer ranks share
    reduce    whole gradients -> reduce-scatter input in reduce_dtype -> 1/W of it in master_dtype; the input stays
              until the next group's reduction

    delayed   over one rank before the last micro-batch, and under a pipeline: whole gradients add up in reduce_dtype

Gathering and reducing run in streams of their own, whose memory the computation cannot reuse. A rank holds
ceil(rows / W) rows of each parameter: the first ranks' share, which none exceeds. W is that of the parameter's view of
the ranks: the rest of a divided expert is shared by fewer ranks than the rest of its layer. A tensor that is cut along
another dimension (`trainer.axes.shard.shard_dim`) is copied once more when it is gathered and before it is reduced.
Groups: `trainer.axes.fsdp.sharded_modules`; source: torch/distributed/fsdp/_fully_shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from configs.choices import OffloadDevice
from trainer.axes import REPLICATE, TENSOR
from trainer.axes.shard import in_order, shard_dim
from trainer.estimate.layouts.common import Layout, Setting
from trainer.estimate.profile import Parameter
from trainer.estimate.timeline import COMPUTE, GATHER, REDUCE, Handle
from trainer.optim.protocol import Held


class FullySharded(Layout):
    """Stages of a pipeline: `layouts.staged`."""

    staged = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        plan, anatomy = self.plan, self.anatomy
        self.reshard = plan.reshard_after_forward
        self.fewer = plan.fsdp.reshard_size
        self.ranks = plan.fsdp_size
        self.replicated = plan.degree(REPLICATE) > 1
        self.offloaded = plan.offload_parameters is not OffloadDevice.none
        # Of each parameter by its `id`: layers of one kind share theirs.
        self.pieces: dict[int, tuple[int, tuple[int, ...]]] = {}
        # Groups without parameters of their own gather nothing.
        self.groups = {name: parameters for name, parameters in anatomy.all_groups() if parameters}
        self.shards = {
            name: [(self._gathered(p), self._ranks(p), self._dim(p) > 0) for p in parameters]
            for name, parameters in self.groups.items()
        }
        # Frozen parameters are gathered as all others, and neither reduced nor updated.
        self.trained = {
            name: sum(self._shard(p) for p in parameters if p.trainable) for name, parameters in self.groups.items()
        }
        self.cast = {
            name: sum(self._gathered(p) for p in parameters if self._cast(p))
            for name, parameters in self.groups.items()
        }
        self.reduced = {
            name: sum(self._shard(p) * self._ranks(p) for p in parameters if p.trainable)
            for name, parameters in self.groups.items()
        }
        self.ends = in_order(name for name in self.groups if name != "root")
        self.between: dict[str, list[Handle | None]] = {}
        self.whole: dict[str, list[Handle | None]] = {}
        self.pending: dict[str, Handle | None] = {}
        self.deferred: Handle | None = None
        self.order: list[str] = []
        self.received: dict[str, dict[str, Handle | None]] = {}
        self.added: dict[str, dict[str, Handle | None]] = {}
        self.late: list[Handle | None] = []
        self.reducing: Handle | None = None
        self.sharded: dict[str, Handle | None] = {}
        self.partial: dict[str, Handle | None] = {}
        self.held: list[Handle | None] = []

    def _cut(self, parameter: Parameter) -> tuple[int, tuple[int, ...]]:
        """The dimension along which it is cut, and the shape of a rank's part, padding included."""
        if (found := self.pieces.get(id(parameter))) is None:
            shape, ranks = list(parameter.shape or (1,)), self._ranks(parameter)
            dim = shard_dim(parameter.shape, parameter.whole.shape, ranks)
            shape[dim] = ceil(shape[dim] / ranks)
            found = self.pieces[id(parameter)] = dim, tuple(shape)
        return found

    def _ranks(self, parameter: Parameter) -> int:
        return self.setting.plan.view(parameter.whole.view).shards

    def _dim(self, parameter: Parameter) -> int:
        return self._cut(parameter)[0]

    def _shard(self, parameter: Parameter) -> int:
        """Elements of a rank's part, padding included."""
        return prod(self._cut(parameter)[1])

    def _piece(self, parameter: Parameter) -> tuple[int, ...]:
        return self._cut(parameter)[1]

    def _gathered(self, parameter: Parameter) -> int:
        """Bytes that a rank gives to a gathering: its part in param_dtype or float8, or of the tensors that hold the
        packed values."""
        shard = self._shard(parameter)
        if parameter.packed:
            return parameter.packed[0] * shard // parameter.numel
        return shard * (parameter.gathered or self.param)

    def _cast(self, parameter: Parameter) -> bool:
        """Whether a rank's part is cast before it is gathered."""
        narrower = self.param != self.master or parameter.gathered > 0
        return parameter.trainable and (narrower or self.in_host_memory)

    def start(self) -> None:
        for parameters in self.groups.values():
            for parameter in parameters:
                kept = self._shard(parameter) * self.master if parameter.trainable else self._gathered(parameter)
                self.setting.place("parameters", kept, self.plan.offload_parameters)
                for scales in parameter.packed[1:]:
                    self.timeline.allocate("parameters", scales)
        self.timeline.allocate("parameters", self.anatomy.buffers_bytes)
        if not self.staged:
            self.setting.place_batch()

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        super().begin_micro_batch(step, first=first, last=last)
        self.order = []

    def before_forward(self, group: str) -> None:
        if group not in self.groups:
            return
        fresh = group not in self.whole
        self._gather(group)
        # Only the next gathering of this forward frees the output of the last one, when its own copies are made.
        if fresh:
            self._copy_out(group)
            self.timeline.free(self.deferred)
            self.deferred = self.pending.pop(group, None)
        for other in self._ahead(group, self.plan.fsdp.forward_prefetch):
            self._gather(other)

    def _ahead(self, group: str, count: int | None, *, back: bool = False) -> list[str]:
        """Groups that a group prefetches by its own list, the nearest first."""
        if count is None or group not in self.ends:
            return []
        place = self.ends.index(group)
        return self.ends[max(0, place - count) : place][::-1] if back else self.ends[place + 1 :][:count]

    def after_forward(self, group: str) -> None:
        if group in self.groups:
            if self.reshard:
                self._drop_but_a_part(group)
            self.order.append(group)
        if group == "root":
            self.timeline.free(self.deferred)
            self.deferred = None

    def before_backward(self, group: str) -> None:
        if group not in self.groups:
            return
        if group not in self.whole:
            self._gather(group)
            self._copy_out(group)
            self.timeline.free(self.pending.pop(group, None))
        place = self.order.index(group) if group in self.order else 0
        listed = self._ahead(group, self.plan.fsdp.backward_prefetch, back=True)
        for other in listed or self.order[max(0, place - 1) : place]:
            self._gather(other)

    def after_backward(self, group: str) -> None:
        if group not in self.groups:
            return
        if self.delayed:
            self._add_up(group)
            if not self.staged:
                self._drop(group)
        else:
            self._reduce(group)

    @property
    def delayed(self) -> bool:
        return self.staged or (self.ranks == 1 and not self.last)

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        narrow = self.added.get(group, {}) if self.reduce == self.param else {}
        received = self.received.setdefault(group, {})
        if parameter not in narrow and parameter not in received:
            received[parameter] = handle
        elif self.plan.degree(TENSOR) > 1:
            # It passes out of the divided layer with the layer's other gradients, when that is done.
            self.late.append(handle)
        else:
            # Autograd adds it to the one that is there.
            self.timeline.free(handle)

    def end_backward(self) -> None:
        for group in ("root", "embedding"):
            self.after_backward(group)
        # The group was prefetched for a backward that had no need of it: that of a frozen embedding.
        self.timeline.free_all(self.pending)
        if not self.delayed:
            self._finish()

    def set_aside(self) -> int:
        return 0 if self.in_host_memory else self.setting.averaged(self.updated())

    def end_alone(self) -> None:
        for group in [*self.whole]:
            self._drop(group)
        for group in [*self.between]:
            self.timeline.free_all(self.between.pop(group))

    def _add_up(self, group: str) -> None:
        """Gradients that are not reduced yet: they are kept whole, in the dtype of the reduction."""
        self.timeline.free_all(self.late)
        added = self.added.setdefault(group, {})
        numel = {parameter.name: parameter.numel for parameter in self.groups[group]}
        for name, handle in self.received.pop(group, {}).items():
            if self.reduce == self.param:
                added[name] = self.timeline.move(handle, "gradients")
                continue
            if name not in added:
                added[name] = self.timeline.allocate("gradients", numel[name] * self.reduce)
            self.timeline.free(handle)

    def _reduce(self, group: str) -> None:
        self.timeline.free_all(self.late)
        received, added = self.received.pop(group, {}), self.added.pop(group, {})
        for name in added.keys() & received.keys():
            self.timeline.free(received.pop(name))
        self._drop(group)
        shard = self.trained[group]
        if not shard:
            return
        self.timeline.free(self.reducing)
        width = {**dict.fromkeys(received, self.param), **dict.fromkeys(added, self.reduce)}
        gradients = received | added
        for parameter in (p for p in self.groups[group] if p.name in gradients and self._dim(p) > 0):
            before = gradients[parameter.name]
            gradients[parameter.name] = self.timeline.allocate("gradients", parameter.numel * width[parameter.name])
            self.timeline.free(before)
        self.reducing = self.timeline.allocate("buffers", self.reduced[group] * self.reduce)
        self.timeline.free_all(gradients)
        self._keep(group, shard)
        if not self.setting.gradients:
            self._apply(group)

    def _apply(self, group: str) -> None:
        """Update a group's shards. FSDP2 keeps the gradients that replicas have all-reduced until the backward is
        done."""
        if not self.in_host_memory:
            self.apply_at_once(group, [self._held(p) for p in self.groups[group] if p.trainable])
        kept = self.sharded.pop(group, None)
        if self.replicated and self.reduce == self.master:
            self.held.append(kept)
        else:
            self.timeline.free(kept)

    @property
    def in_host_memory(self) -> bool:
        """The device on which the shards are updated."""
        return self.offloaded and self.setting.gpu

    def _finish(self) -> None:
        """Finish after the last group's reduction. Parts of gradients are joined and summed over the tensor-parallel
        ranks."""
        self.timeline.free_all([self.reducing, *self.held])
        self.reducing = None
        self.held.clear()
        if self.last:
            parts = [self._shard(p) for p in self.anatomy.parameters() if p.summed == TENSOR]
            self.timeline.free(self.timeline.allocate("workspace", sum(parts) * self.master))

    def update(self, step: int) -> None:
        update_together([self], step)

    def updated(self) -> list[Held]:
        """This rank's pieces of the trained parameters."""
        members = [parameter for group in self.groups.values() for parameter in group]
        return [self._held(p) for p in members if p.trainable]

    def _held(self, parameter: Parameter) -> Held:
        return Held(whole=parameter.whole, shape=self._piece(parameter))

    def clear(self) -> None:
        self.timeline.free_all(self.sharded)

    def _gather(self, group: str) -> None:
        """Start the all-gather: its output is one flat tensor."""
        gathered = sum(shard * ranks for shard, ranks, _ in self.shards[group] if ranks > 1)
        if group in self.whole or group in self.pending or not gathered:
            return
        # From fewer ranks they come as they were kept, in param_dtype.
        cast = self.timeline.allocate("buffers", 0 if group in self.between else self.cast[group], GATHER)
        self.pending[group] = self.timeline.allocate("buffers", gathered, GATHER)
        self.timeline.free(cast)

    def _copy_out(self, group: str) -> None:
        """Whole parameters, each in a tensor of its own. Over one rank they are cast here, one after the other."""
        copies: list[Handle | None] = []
        joined: list[Handle | None] = []
        cast: Handle | None = None
        for shard, ranks, again in self.shards[group]:
            previous, cast = cast, None
            if ranks == 1 and self.param != self.master:
                cast = self.timeline.allocate("buffers", shard, COMPUTE)
            self.timeline.free(previous)
            copies.append(self.timeline.allocate("buffers", shard * ranks, COMPUTE))
            if again:
                joined.append(self.timeline.allocate("buffers", shard * ranks, COMPUTE))
        self.timeline.free_all([cast, *joined, *self.between.pop(group, [])])
        self.whole[group] = copies

    def _drop_but_a_part(self, group: str) -> None:
        """Drop parameters after the forward. fewer: the ranks over which the rest is sharded, if given."""
        if self.fewer is not None and self.fewer < self.ranks and group in self.whole:
            parts = (shard * ranks // self.fewer for shard, ranks, _ in self.shards[group])
            self.between[group] = [self.timeline.allocate("buffers", part, COMPUTE) for part in parts]
        self._drop(group)

    def _drop(self, group: str) -> None:
        self.timeline.free_all(self.whole.pop(group, []))

    def _keep(self, group: str, shard: int) -> None:
        """Take this rank's part of the reduced gradient: keep it, or add it to the one that is kept."""
        reduced = self.timeline.allocate("gradients", shard * self.reduce, REDUCE)
        if self.replicated and not self.last:
            if group in self.partial:
                self.timeline.free(reduced)
            else:
                self.partial[group] = reduced
            return
        self.timeline.free(self.partial.pop(group, None))
        if self.reduce != self.master:
            cast = self.timeline.allocate("gradients", shard * self.master, REDUCE)
            if self.replicated:
                self.held.append(reduced)
            else:
                self.timeline.free(reduced)
            reduced = cast
        if group in self.sharded or self.in_host_memory:
            self.timeline.free(reduced)
        else:
            self.sharded[group] = reduced


def update_together(layouts: Sequence[FullySharded], step: int) -> None:
    """Update all parameters of a rank, whichever of its modules they are in."""
    setting = layouts[0].setting
    held = [one for layout in layouts for one in layout.updated()]
    if layouts[0].in_host_memory:
        setting.host["optimizer"] = setting.states_bytes(held)
        gradients = [size for layout in layouts for size in layout.trained.values()]
        setting.host["gradients"] = (sum if setting.gradients else max)(gradients) * layouts[0].master
    elif setting.gradients:
        if step == 1:
            setting.place_states(held)
        setting.update([one for one in held if len(one.shape) > 1])
    elif not setting.passes.backwards:
        layouts[0].update_each(held)
    for layout in layouts:
        layout.clear()
