"""One process, and data parallel (DDP): every rank holds parameters, gradients and states whole.

Under DDP gradients live in its buckets. DDP learns in its first backward, which the trainer runs before step 1
(`parallel.ddp`), in which order gradients become ready, and builds its buckets again at the start of step 1, one after
another; an old one is freed when its last gradient has moved.

Gradients that are applied inside the backward have no buckets: with two replicas each is sent alone, and waits for the
next one.
"""

from __future__ import annotations

from collections.abc import Iterable

from trainer.axes import REPLICATE
from trainer.estimate.layouts.common import Layout, Setting
from trainer.estimate.timeline import Handle
from trainer.optim.protocol import Held

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20

Key = tuple[str, str]


class Replicated(Layout):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.copied = self.plan.degree(REPLICATE) > 1
        self.ddp = self.copied and setting.gradients
        anatomy = self.anatomy
        # Of the parameters that are trained; the others are only held.
        self.sizes = {
            (group, parameter.name): parameter.numel * self.master
            for group, parameters in anatomy.all_groups()
            for parameter in parameters
            if parameter.trainable
        }
        self.pieces = {
            (group, p.name): Held(whole=p.whole, shape=p.shape)
            for group, parameters in anatomy.all_groups()
            for p in parameters
            if p.trainable
        }
        self.held = list(self.pieces.values())
        self.flying: tuple[Key, Handle | None] | None = None
        self.frozen = list(anatomy.frozen_tensors(self.param))
        self.gradients: dict[Key, Handle | None] = {}
        self.buckets: list[tuple[set[Key], Handle | None]] = []

    def start(self) -> None:
        for size in (*self.sizes.values(), *self.frozen):
            self.timeline.allocate("parameters", size)
        self.timeline.allocate("parameters", self.anatomy.buffers_bytes)
        if self.ddp:
            self.buckets = self._make_buckets(self.sizes)
        self.setting.place_batch()

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None:
        super().begin_micro_batch(step, first=first, last=last)
        if self.ddp and first and step == 1:
            self.buckets = self._make_buckets(reversed(self.sizes), old=self.buckets)

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        key = (group, parameter)
        if not self.setting.gradients:
            self._came(key, self.timeline.move(handle, "gradients"))
        elif self.ddp:
            # Added to a view of a bucket.
            self.timeline.free(handle)
            if self.last:
                self._compress(key)
        elif key in self.gradients:
            self.timeline.free(handle)
        else:
            self.gradients[key] = self.timeline.move(handle, "gradients")

    def end_backward(self) -> None:
        self._land()

    def _came(self, key: Key, handle: Handle | None) -> None:
        if not self.copied:
            self._use(key, handle)
            return
        if self.reduce != self.master:
            sent = self.timeline.allocate("gradients", self.sizes[key] * self.reduce // self.master)
            self.timeline.free(handle)
            handle = sent
        self._land()
        self.flying = key, handle

    def _land(self) -> None:
        if self.flying is None:
            return
        (key, handle), self.flying = self.flying, None
        if self.reduce != self.master:
            whole = self.timeline.allocate("gradients", self.sizes[key])
            self._use(key, whole)
            self.timeline.free(handle)
        else:
            self._use(key, handle)

    def _use(self, key: Key, handle: Handle | None) -> None:
        self.apply_at_once("/".join(key), [self.pieces[key]])
        self.timeline.free(handle)

    def set_aside(self) -> int:
        return 0 if self.ddp else self.setting.averaged(self.held)  # DDP's buckets have the room

    def update(self, step: int) -> None:
        if not self.setting.passes.backwards:
            self.update_each(self.held)
        if not self.setting.gradients:
            return
        if step == 1:
            self.setting.place_states(self.held)
        self.setting.update([one for one in self.held if len(one.shape) > 1])
        self.timeline.free_all(self.gradients)

    def _make_buckets(
        self, keys: Iterable[Key], old: Iterable[tuple[set[Key], Handle | None]] = ()
    ) -> list[tuple[set[Key], Handle | None]]:
        """The buckets that torch assigns: parameters in order; a bucket is closed when it reaches its limit."""
        assigned, size, limit = [set[Key]()], 0, FIRST_BUCKET
        for key in keys:
            if size >= limit:
                assigned.append(set())
                size, limit = 0, BUCKET
            assigned[-1].add(key)
            size += self.sizes[key]
        buckets, waiting = [], [(set(members), handle) for members, handle in old]
        for members in assigned:
            buckets.append((members, self.timeline.allocate("gradients", sum(self.sizes[key] for key in members))))
            for place, handle in waiting:
                if place and not place - members:
                    self.timeline.free(handle)
                place -= members
        return buckets

    def _compress(self, key: Key) -> None:
        """Send the bucket that this gradient completes, as a copy in reduce_dtype."""
        if self.plan.reduce_dtype is self.plan.master_dtype:
            return
        ratio = self.reduce / self.master
        for members, handle in self.buckets:
            if key in members and handle is not None:
                self.timeline.free(self.timeline.allocate("buffers", int(handle[1] * ratio)))
