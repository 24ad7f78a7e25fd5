"""One training step as a sequence of allocations: the trace of three layers becomes the step of the whole model.

    for each micro-batch      begin, layer 0 .. L-1, end, loss  |  loss, end, layer L-1 .. 0, begin
    then                      the update

What the model's own code allocates comes from the trace. What the layout adds (buckets, gathered parameters, reduce
buffers, where gradients go) it does itself at the same points at which its hooks fire: a `Layout` stands for the
engine's data-parallel part and for the optimizer. Two steps are replayed, because optimizer states appear at the end
of the first; of several micro-batches the first and the last, because those between are no different. Under a
pipeline micro-batches overlap, so that a rank's actions are replayed in the order in which it runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from trainer.memory.profile import Profile
from trainer.memory.timeline import Handle, Timeline
from trainer.parallel.pipeline_orders import Action

STEPS = 2


class Layout(Protocol):
    """What an engine does around the model's own code. Groups are those of `Anatomy`."""

    def start(self) -> None:
        """Allocate what is there before step 1."""
        ...

    def begin_micro_batch(self, step: int, *, first: bool, last: bool) -> None: ...

    def before_forward(self, group: str) -> None: ...

    def after_forward(self, group: str) -> None: ...

    def before_backward(self, group: str) -> None: ...

    def after_backward(self, group: str) -> None: ...

    def gradient(self, group: str, parameter: str, handle: Handle | None) -> None:
        """This micro-batch's gradient of a parameter is complete. The layout owns it from here on."""
        ...

    def end_backward(self) -> None: ...

    def update(self, step: int) -> None:
        """Clip, update the parameters, clear the gradients."""
        ...


class StageLayout(Layout, Protocol):
    """A layout under a pipeline, where nothing is reduced before a rank's last backward."""

    def reduce_all(self) -> None: ...


class Neighbours(Protocol):
    """What a pipeline's rank keeps of what it sends and receives."""

    def start_step(self) -> None: ...

    def after(self, action: Action) -> None: ...

    def end_step(self) -> None: ...


def replay(
    profile: Profile, layout: Layout, timeline: Timeline, *, micro_batches: int, inputs: Sequence[int] = ()
) -> None:
    """Replay the first two steps on the timeline. inputs: bytes of what the engine makes of a step's batches."""
    script = _Script(profile)
    layout.start()
    numbers = [0] if micro_batches == 1 else [0, micro_batches - 1]
    for step in range(1, STEPS + 1):
        given = [timeline.allocate("activations", size) for size in inputs]
        for number in numbers:
            layout.begin_micro_batch(step, first=number == 0, last=number == micro_batches - 1)
            running = _MicroBatch(script, layout, timeline, step)
            running.forward()
            running.backward()
        for handle in given:
            timeline.free(handle)
        timeline.phase("optimizer step", step)
        layout.update(step)
    timeline.sample()


def replay_stages(
    stages: Mapping[int, tuple[Profile, StageLayout]],
    order: Sequence[Action],
    timeline: Timeline,
    *,
    inputs: Sequence[int],
    neighbours: Neighbours,
    update: Callable[[int], None],
) -> None:
    """Replay two steps of a pipeline's rank. stages: those it holds. order: what it does (`pipeline_orders`). update:
    the optimizer's, of all stages at once."""
    scripts = {stage: _Script(profile) for stage, (profile, _) in stages.items()}
    for _, layout in stages.values():
        layout.start()
    for step in range(1, STEPS + 1):
        neighbours.start_step()
        given = [timeline.allocate("activations", size) for size in inputs]
        for _, layout in stages.values():
            layout.begin_micro_batch(step, first=True, last=False)
        running: dict[tuple[int, int], _MicroBatch] = {}
        for action in order:
            kind, stage, number = action
            if kind == "F":
                running[stage, number] = _MicroBatch(scripts[stage], stages[stage][1], timeline, step)
                running[stage, number].forward()
            elif kind == "I":
                # The first stage's input has no gradient: its whole backward waits for W.
                if stage > 0:
                    running[stage, number].backward("i")
            elif kind == "W" and stage > 0:
                running.pop((stage, number)).weights()
            else:
                running.pop((stage, number)).backward()
            neighbours.after(action)
        for _, layout in stages.values():
            layout.reduce_all()
        neighbours.end_step()
        for handle in given:
            timeline.free(handle)
        timeline.phase("optimizer step", step)
        update(step)
    timeline.sample()


class _Script:
    """A module's sections made ready for replaying, once for all its micro-batches."""

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


class _MicroBatch:
    def __init__(self, script: _Script, layout: Layout, timeline: Timeline, step: int) -> None:
        self.script, self.layout, self.timeline, self.step = script, layout, timeline, step
        self.templates = script.templates
        self.live: dict[tuple[str, str], dict[int, Handle | None]] = {}

    def forward(self) -> None:
        layout, timeline = self.layout, self.timeline
        timeline.phase("forward", self.step)
        layout.before_forward("root")
        self._section("f", "begin", "begin")
        for layer, template in enumerate(self.templates):
            layout.before_forward(str(layer))
            self._section("f", template, str(layer))
            layout.after_forward(str(layer))
            timeline.sample()
        self._section("f", "end", "end")

    def backward(self, phase: str = "b") -> None:
        """phase: "b" for a whole backward, "i" for that of the input alone, after which `weights` follows."""
        layout, timeline = self.layout, self.timeline
        self._section(phase, "end", "end")
        timeline.phase("backward", self.step)
        for layer, template in reversed(list(enumerate(self.templates))):
            layout.before_backward(str(layer))
            self._section(phase, template, str(layer))
            layout.after_backward(str(layer))
            timeline.sample()
        self._section(phase, "begin", "begin")
        layout.end_backward()
        if phase == "b":
            self._end()

    def weights(self) -> None:
        self.timeline.phase("backward", self.step)
        self._section("w", "begin", "begin")
        for layer, template in enumerate(self.templates):
            self._section("w", template, str(layer))
        self._section("w", "end", "end")
        self._end()

    def _end(self) -> None:
        for handles in self.live.values():
            for handle in handles.values():
                self.timeline.free(handle)

    def _section(self, phase: str, template: str, instance: str) -> None:
        allocate, free = self.timeline.allocate, self.timeline.free
        live = self.live.setdefault((phase, instance), {})
        for entry in self.script.sections.get((phase, template), ()):
            match entry[0]:
                case "+":
                    live[entry[1]] = allocate(entry[3], entry[2])
                case "-":
                    if entry[2] == template and entry[1] == phase:
                        free(live.pop(entry[3], None))
                        continue
                    for handle in self._take(entry, template, instance):
                        free(handle)
                case "g":
                    group = instance if entry[1].isdigit() else entry[1]
                    found = self._take(("-", *entry[3:]), template, instance) if entry[5] >= 0 else []
                    self.layout.gradient(group, entry[2], found[0] if found else None)
                case "m":
                    self._mark(entry[1], entry[2])

    def _mark(self, name: str, group: str) -> None:
        match name:
            case "loss":
                self.timeline.phase("loss", self.step)
            case "backward" | "input":
                self.layout.before_backward("root")
            case "forward_enter":
                self.layout.before_forward(group)
            case "forward_exit":
                self.layout.after_forward(group)
            case "backward_enter":
                self.layout.before_backward(group)
            case "backward_exit" if not group.isdigit():
                self.layout.after_backward(group)

    def _take(self, entry: tuple[object, ...], template: str, instance: str) -> list[Handle | None]:
        """The storages that a traced death means: the same birth, in the layer that stands in the same place. What
        dies outside the layers dies for every layer that the traced one stands for."""
        _, phase, section, number = entry
        assert isinstance(phase, str) and isinstance(section, str) and isinstance(number, int)
        if section == template:
            return [self._pop((phase, instance), section, number, section)]
        if not section.isdigit():
            return [self._pop((phase, section), section, number, section)]
        if template.isdigit():
            place = int(section) + int(instance) - int(template)
            if not 0 <= place < len(self.templates):
                return []
            return [self._pop((phase, str(place)), section, number, self.templates[place])]
        return [self._pop((phase, place), section, number, section) for place in self.script.stands_for[section]]

    def _pop(self, key: tuple[str, str], section: str, number: int, template: str) -> Handle | None:
        live = self.live.get(key)
        if live is None:
            return None
        if template != section:
            # A neighbour of another kind numbers its storages differently.
            size, alike = self.script.sizes[key[0], section][number], self.script.sizes.get((key[0], template), {})
            if alike.get(number) != size:
                number = next((n for n in live if alike.get(n) == size), -1)
        return live.pop(number, None)
