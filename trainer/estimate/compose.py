"""One training step as a sequence of allocations: the trace of three layers becomes the step of the whole model.

    for each micro-batch      begin, layer 0 .. L-1, end, loss  |  loss, end, layer L-1 .. 0, begin
    then                      the update

The memory that the model's own code allocates comes from the trace. The memory that the layout adds (buckets, gathered
parameters, reduce buffers, gradients) comes at the points where its hooks fire: a `Layout` represents the
engine's data-parallel part and the optimizer. Two steps are replayed, because optimizer states appear at the end
of the first. Of several micro-batches the first and the last are replayed, because the others are the same. Under a
pipeline micro-batches overlap, so a rank's actions are replayed in the order in which it runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Protocol

from trainer.axes.pipeline.orders import Action
from trainer.estimate.layouts.common import Layout
from trainer.estimate.layouts.staged import Staged
from trainer.estimate.profile import Profile
from trainer.estimate.program import PHASE, Program, Running
from trainer.estimate.timeline import Timeline

STEPS = 2


class Neighbours(Protocol):
    """The tensors sent and received that a pipeline rank keeps."""

    def after(self, action: Action) -> None: ...

    def end_step(self) -> None: ...


def replay(
    profile: Profile, layout: Layout, timeline: Timeline, *, micro_batches: int, inputs: Sequence[int] = ()
) -> None:
    """Replay the first two steps on the timeline. inputs: bytes of the tensors that the engine makes of a step's
    batches."""
    program = Program(profile)
    layout.start()
    numbers = [0] if micro_batches == 1 else [0, micro_batches - 1]
    passes = layout.setting.passes
    count = passes.backwards or passes.forwards
    for step in range(1, STEPS + 1):
        given = [timeline.allocate("activations", size) for size in inputs]
        for number, again in product(numbers, range(count)):
            layout.begin_micro_batch(step, first=number == 0, last=number == micro_batches - 1)
            layout.begin_pass(applying=again == count - 1 and not layout.setting.gradients)
            running = Running(program, layout, timeline, step)
            running.run("f")
            running.run("b" if passes.backwards else "e")
        timeline.free_all(given)
        timeline.phase("optimizer step", step)
        layout.update(step)
    timeline.sample()


def replay_validation(profile: Profile, layout: Layout, timeline: Timeline) -> None:
    """Replay a forward without a backward on averaged weights, while the trained weights wait.

    profile: that of such a forward."""
    timeline.phase("validation", STEPS)
    waiting = timeline.allocate("parameters", layout.set_aside())
    layout.begin_micro_batch(STEPS, first=True, last=True)
    program = Program(profile)
    program.parts["f"] = [op for op in program.parts["f"] if op[0] != PHASE]
    running = Running(program, layout, timeline, STEPS)
    running.run("f")
    running.run("e")
    timeline.free(waiting)
    timeline.sample()


def replay_stages(
    stages: Mapping[int, tuple[Profile, Staged]],
    order: Sequence[Action],
    timeline: Timeline,
    *,
    inputs: Sequence[int],
    neighbours: Neighbours,
    update: Callable[[int], None],
) -> None:
    """Replay two steps of a pipeline's rank.

    stages: those that the rank holds.
    order: its actions (`pipeline.orders`).
    update: the optimizer's, of all stages at once."""
    programs = {stage: Program(profile) for stage, (profile, _) in stages.items()}
    for _, layout in stages.values():
        layout.start()
    for step in range(1, STEPS + 1):
        given = [timeline.allocate("activations", size) for size in inputs]
        for _, layout in stages.values():
            layout.begin_micro_batch(step, first=True, last=False)
        running: dict[tuple[int, int], Running] = {}
        for action in order:
            timeline.mark()
            kind, stage, number = action
            if kind == "F":
                running[stage, number] = Running(programs[stage], stages[stage][1], timeline, step)
                running[stage, number].run("f")
            elif kind == "I":
                # The first stage's input has no gradient: its whole backward waits for W.
                if stage > 0:
                    running[stage, number].run("i")
            elif kind == "W" and stage > 0:
                running.pop((stage, number)).run("w")
            else:
                running.pop((stage, number)).run("b")
            neighbours.after(action)
        for _, layout in stages.values():
            layout.reduce_all()
        neighbours.end_step()
        timeline.free_all(given)
        timeline.phase("optimizer step", step)
        update(step)
    timeline.sample()
