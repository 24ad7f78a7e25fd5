"""A module's forward and backward as flat lists of operations: the trace of three layers, written out for all.

    compiled once per module    the death of each storage, in every layer, is settled here
    run per micro-batch         `Running.run`: allocate, free, and call the layout where its hooks fire

A storage is a slot: a place in a list that each micro-batch has of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.estimate.profile import Profile
from trainer.estimate.timeline import Handle, Timeline

if TYPE_CHECKING:
    from trainer.estimate.layouts.common import Layout

ALLOCATE, FREE, GRADIENT, HOOK, PHASE, SAMPLE = range(6)

Op = tuple[int, int, Any, Any]
"""(ALLOCATE, slot, component, bytes)   (FREE, slot, -, -)   (GRADIENT, slot or -1, group, parameter)
(HOOK, -, name of the layout's method, group)   (PHASE, -, name, -)   (SAMPLE, -, -, -)"""

Live = dict[tuple[str, str], dict[int, int]]
"""Slots of the storages that are alive: (phase, layer or "begin" or "end") of their birth -> number there -> slot."""


class Program:
    """parts: the operations of "f" forward, "b" backward, or, where the schedule splits it, "i" (gradient of the input)
    and "w" (of the weights); "e" the end of a forward that has no backward. slots: how many a micro-batch needs."""

    def __init__(self, profile: Profile) -> None:
        writer = _Writer(profile)
        self.parts: dict[str, Sequence[Op]] = {"f": writer.forward()}
        self.parts["e"] = writer.end()
        after_forward = {key: dict(slots) for key, slots in writer.live.items()}
        self.parts["b"] = [*writer.backward("b"), *writer.end()]
        if any(phase == "i" for phase, _ in profile.trace.sections):
            writer.live = after_forward
            self.parts["i"] = writer.backward("i")
            self.parts["w"] = [*writer.weights(), *writer.end()]
        self.slots = writer.slots


class Running:
    """One micro-batch on its way through a module."""

    def __init__(self, program: Program, layout: Layout, timeline: Timeline, step: int) -> None:
        self.parts, self.layout, self.timeline, self.step = program.parts, layout, timeline, step
        self.slots: list[Handle | None] = [None] * program.slots

    def run(self, part: str) -> None:
        slots, timeline, layout = self.slots, self.timeline, self.layout
        allocate, free = timeline.allocate, timeline.free
        if part in "bi":
            layout.begin_backward()
        for code, slot, first, second in self.parts[part]:
            if code == ALLOCATE:
                slots[slot] = allocate(first, second)
            elif code == FREE:
                free(slots[slot])
            elif code == GRADIENT:
                layout.gradient(first, second, slots[slot] if slot >= 0 else None)
            elif code == HOOK:
                getattr(layout, first)(second)
            elif code == PHASE:
                timeline.phase(first, self.step)
            else:
                timeline.sample()
        if part in "bi":
            layout.end_backward()
        elif part == "e":
            layout.end_alone()


class _Writer:
    def __init__(self, profile: Profile) -> None:
        layers, trace = profile.anatomy.layers, profile.trace
        self.templates = [str(trace.template_of(layer, layers)) for layer in range(len(layers))]
        self.sections = trace.sections
        self.sizes = {
            key: {entry[1]: entry[2] for entry in steps if entry[0] == "+"} for key, steps in trace.sections.items()
        }
        self.stands_for = {
            section: [str(layer) for layer, template in enumerate(self.templates) if template == section]
            for _, section in trace.sections
        }
        self.live: Live = {}
        self.slots = 0
        self.ops: list[Op] = []

    def forward(self) -> list[Op]:
        self.ops = [(PHASE, 0, "forward", None), (HOOK, 0, "before_forward", "root")]
        self._section("f", "begin", "begin")
        for layer, template in enumerate(self.templates):
            self._layer("f", template, str(layer), "before_forward", "after_forward")
        self._section("f", "end", "end")
        return self.ops

    def backward(self, phase: str) -> list[Op]:
        self.ops = []
        self._section(phase, "end", "end")
        self.ops.append((PHASE, 0, "backward", None))
        for layer, template in reversed(list(enumerate(self.templates))):
            self._layer(phase, template, str(layer), "before_backward", "after_backward")
        self._section(phase, "begin", "begin")
        return self.ops

    def weights(self) -> list[Op]:
        self.ops = [(PHASE, 0, "backward", None)]
        self._section("w", "begin", "begin")
        for layer, template in enumerate(self.templates):
            self._section("w", template, str(layer))
        self._section("w", "end", "end")
        return self.ops

    def end(self) -> list[Op]:
        """Storages still alive at the end of the trace are freed with the micro-batch."""
        return [(FREE, slot, None, None) for slots in self.live.values() for slot in slots.values()]

    def _layer(self, phase: str, template: str, layer: str, before: str, after: str) -> None:
        self.ops.append((HOOK, 0, before, layer))
        self._section(phase, template, layer)
        self.ops += [(HOOK, 0, after, layer), (SAMPLE, 0, None, None)]

    def _section(self, phase: str, template: str, instance: str) -> None:
        born = self.live.setdefault((phase, instance), {})
        for entry in self.sections.get((phase, template), ()):
            match entry[0]:
                case "+":
                    _, number, size, component = entry
                    if size > 0:
                        born[number] = self.slots
                        self.ops.append((ALLOCATE, self.slots, component, size))
                        self.slots += 1
                case "-":
                    self.ops += [(FREE, slot, None, None) for slot in self._take(entry[1:], template, instance)]
                case "g":
                    group = instance if entry[1].isdigit() else entry[1]
                    found = self._take(entry[3:], template, instance) if entry[5] >= 0 else []
                    self.ops.append((GRADIENT, found[0] if found else -1, group, entry[2]))
                case "m":
                    self._mark(entry[1], entry[2])

    def _mark(self, name: str, group: str) -> None:
        match name:
            case "loss":
                self.ops.append((PHASE, 0, "loss", None))
            case "forward_enter":
                self.ops.append((HOOK, 0, "before_forward", group))
            case "forward_exit":
                self.ops.append((HOOK, 0, "after_forward", group))
            case "backward_enter":
                self.ops.append((HOOK, 0, "before_backward", group))
            case "backward_exit" if not group.isdigit():
                self.ops.append((HOOK, 0, "after_backward", group))

    def _take(self, birth: tuple[Any, ...], template: str, instance: str) -> list[int]:
        """The slots that a traced death means: the same birth, in the layer that stands in the same place. What dies
        outside the layers dies for every layer that the traced one stands for."""
        phase, section, number = birth
        if section == template:
            places = {instance: section}
        elif not section.isdigit():
            places = {section: section}
        elif template.isdigit():
            place = int(section) + int(instance) - int(template)
            places = {str(place): self.templates[place]} if 0 <= place < len(self.templates) else {}
        else:
            places = {place: section for place in self.stands_for[section]}
        found = [self._pop((phase, place), section, number, alike) for place, alike in places.items()]
        return [slot for slot in found if slot is not None]

    def _pop(self, key: tuple[str, str], section: str, number: int, template: str) -> int | None:
        live = self.live.get(key)
        if live is None:
            return None
        if template != section:
            # A neighbour of another kind numbers its storages differently.
            size, alike = self.sizes[key[0], section][number], self.sizes.get((key[0], template), {})
            if alike.get(number) != size:
                number = next((n for n in live if alike.get(n) == size), -1)
        return live.pop(number, None)
