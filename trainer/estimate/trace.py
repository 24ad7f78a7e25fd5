"""Run the model's own code on fake tensors and record every storage: the source of all activation bytes.

    a unit (`units`: a few layers, cut and divided as in the run) -> fake parameters
    -> forward, the trainer's loss, backward, under a StorageTracker -> sections of a `Trace`

Nothing is computed and nothing is allocated: a trace of Llama 405B takes seconds and no memory. There are no formulas
for families of models; the bytes that Hugging Face's code and autograd keep are counted.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from configs.errors import CookbookError, first_line
from trainer.axes.fsdp import sharded_modules
from trainer.axes.gradients import local
from trainer.estimate.family import Unlike
from trainer.estimate.kernels import as_on_device, quiet
from trainer.estimate.profile import Step, Trace
from trainer.estimate.tracker import CAST, Born, Died, Mark, StorageTracker
from trainer.estimate.units import Feed, Shape, Unit, groups_of
from trainer.model.layers import EightBits, as_parameter, is_packed, of_type
from trainer.model.objective import Objective

Groups = dict[str, tuple[str, str]]
FROZEN_BY_PYTHON = 10_000
"""Objects: since 3.12 some hundred at its start. After freezing the objects of torch and transformers there are 100
times more."""


class CannotTrace(Exception):
    """The model's code reads values of tensors, which fake tensors do not have."""


def trace_unit(unit: Unit, shape: Shape, *, most: int | None = None) -> Trace:
    """Trace one micro-batch. unit: on the meta device; it is filled with fake tensors. most: storages that may be born.
    Raises CannotTrace, and Unlike where there are more."""
    groups = groups_of(unit)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _make_fake(unit.module, shape.storage, frozen=shape.compute or shape.storage)
        feed = _feed(unit, shape)
    unit.module.train(shape.backward)
    if unit.stage is not None:
        unit.stage.border.dtype = shape.storage
    sections: dict[tuple[str, str], tuple[Step, ...]] = {}
    run = _micro_batch if unit.stage is None else _stage_runner()
    # Schedules that split the backward of some micro-batches run it whole for others.
    for split in (False, True) if shape.split_backward and unit.stage and not unit.stage.is_first else (False,):
        tracker = StorageTracker(on_birth=None if most is None else partial(_count, itertools.count(1), most))
        with (
            _collecting_what_is_new(),
            as_on_device(gpu=shape.gpu, exact_attention=shape.exact_attention, documents=shape.documents),
            mode,
            tracker,
            warnings.catch_warnings(),
            quiet(),
        ):
            warnings.simplefilter("ignore")
            try:
                handles = _set_marks(unit, tracker, groups)
                run(unit, feed, shape, tracker, split=split)
            except (CookbookError, Unlike):
                raise
            except Exception as error:  # the model's own code: anything may fail in it without values
                raise CannotTrace(first_line(error)) from None
            for handle in handles:
                handle.remove()
            named = list(unit.module.named_parameters())
            gradients = {name: tracker.number_of(p.grad) for name, p in named if p.grad is not None}
            for _, parameter in named:
                parameter.grad = None
            gc.collect()
        sections |= _sections(tracker, gradients, groups, len(unit.kinds))
    return Trace(templates=unit.kinds, sections=sections)


def _count(births: Iterator[int], most: int) -> None:
    if next(births) > most:
        raise Unlike


@contextmanager
def _collecting_what_is_new() -> Iterator[None]:
    """Leave the objects of torch and transformers out of a collection: with them it takes as long as a trace."""
    frozen = gc.get_freeze_count() > FROZEN_BY_PYTHON
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # else all objects that the parent process has frozen would be collected again and again
            gc.unfreeze()


def _feed(unit: Unit, shape: Shape) -> Feed:
    size = (shape.micro_batch_size, shape.seq_len)
    tokens = torch.zeros(size, dtype=torch.long)
    inputs, received = tokens, None
    if unit.stage is not None:
        hidden = (*size, *unit.stage.hidden)
        if not unit.stage.is_first:
            inputs = torch.zeros(hidden, dtype=shape.storage, requires_grad=True)
        if not unit.stage.is_last:
            received = torch.zeros(hidden, dtype=shape.storage)
    extras = {"position_ids": torch.zeros(size, dtype=torch.long)} if shape.positions else {}
    if unit.stage is not None and unit.stage.repeated:
        extras["tokens"] = tokens
    return Feed(inputs=inputs, labels=tokens, extras=extras, received=received)


def _micro_batch(unit: Unit, feed: Feed, shape: Shape, tracker: StorageTracker, *, split: bool) -> None:
    """Run a micro-batch as the engines do: forward under autocast or not, loss over the sum of valid tokens,
    backward. split: never true without a pipeline."""

    def run(**more: torch.Tensor) -> Any:
        with torch.autocast("cpu", shape.compute) if shape.compute else nullcontext():
            output = unit.module(input_ids=feed.inputs, use_cache=False, **feed.extras, **more)
        tracker.mark("forward_exit root")
        # The root begins its backward when the gradient of its output is complete: of its logits, after the loss's.
        if (returned := _first_with_gradient(output)) is not None:
            returned.register_hook(lambda _: tracker.mark("backward_enter root"))
        if shape.logits_dtype is not None and not unit.parts.objective.inside:
            output.logits = output.logits.to(shape.logits_dtype)
        return output

    with nullcontext() if shape.backward else torch.no_grad():
        loss = unit.parts.objective(run, feed.labels)
    if not shape.backward:
        return
    tracker.mark("backward")
    loss.backward()


def _stage_runner() -> Callable[..., None]:
    """The module is imported before the fake mode, which would see the tensors that the import makes."""
    from trainer.estimate.trace_stage import run_stage

    return run_stage


def _make_fake(model: nn.Module, dtype: torch.dtype, *, frozen: torch.dtype) -> None:
    """Replace meta parameters and buffers by fake ones, this rank's part of each; a shared parameter stays one.

    frozen: dtype of the frozen parameters."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if (fake := made.get(id(parameter))) is None:
                    kind = dtype if parameter.requires_grad else frozen
                    part = local(parameter)
                    packed = is_packed(module, name)
                    values = module.imitate(kind) if packed else torch.empty(part.shape, dtype=kind)
                    values = of_type(part, values)
                    if name == "weight" and isinstance(module, EightBits):
                        values = module.gathered(values)
                    fake = as_parameter(parameter, values)
                    made[id(parameter)] = fake
                module._parameters[name] = fake
        # A real buffer would become a fake one at its first use, and count as new.
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _set_marks(unit: Unit, tracker: StorageTracker, groups: Groups) -> list[Any]:
    """Hooks that record when forward and backward enter and leave each group, and when a gradient is complete."""
    handles = []
    for name, module in sharded_modules(unit.module).items():
        handles.append(module.register_forward_pre_hook(_entering(name, tracker), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaving(name, tracker)))
    for name, parameter in unit.module.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_complete(name, tracker)))
    objective, head = unit.parts.objective, unit.module.get_output_embeddings()
    if objective.sliced and unit.returns_logits and isinstance(head, nn.Module):
        # Everything that follows belongs to the loss, a tied head's part too.
        handles.append(head.register_forward_pre_hook(lambda *_: tracker.mark("loss")))
    elif unit.returns_logits:
        handles.append(_marking(objective, tracker))
    return handles


class _marking:
    """Marks where the loss begins."""

    def __init__(self, objective: Objective, tracker: StorageTracker) -> None:
        self.objective, self.loss = objective, objective.loss

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            tracker.mark("loss")
            return self.loss(logits, labels)

        objective.loss = loss

    def remove(self) -> None:
        self.objective.loss = self.loss


def _first_with_gradient(values: object) -> torch.Tensor | None:
    return next((x for x in tree_iter(values) if isinstance(x, torch.Tensor) and x.requires_grad), None)


def _entering(name: str, tracker: StorageTracker) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, kwargs: object) -> None:
        tracker.mark(f"forward_enter {name}")
        tensor = _first_with_gradient((args, kwargs))
        if tensor is not None:
            tensor.register_hook(lambda _: tracker.mark(f"backward_exit {name}"))

    return hook


def _leaving(name: str, tracker: StorageTracker) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        tracker.mark(f"forward_exit {name}")
        tensor = _first_with_gradient(output)
        if tensor is not None:
            tensor.register_hook(lambda _: tracker.mark(f"backward_enter {name}"))

    return hook


def _complete(name: str, tracker: StorageTracker) -> Callable[[torch.Tensor], None]:
    return lambda parameter: tracker.mark(f"gradient {name}")


def _sections(
    tracker: StorageTracker, gradients: dict[str, int | None], grouped: Groups, layers: int
) -> dict[tuple[str, str], tuple[Step, ...]]:
    """Cut the list of events at the borders of the layers and give each storage its number and category."""
    owned = {number for number in gradients.values() if number is not None}
    key, part = ("f", "begin"), "activations"
    sections: dict[tuple[str, str], list[Step]] = {key: []}
    place: dict[int, tuple[str, str, int]] = {}
    counts: dict[tuple[str, str], Iterator[int]] = {}
    for event in tracker.events:
        steps = sections.setdefault(key, [])
        match event:
            case Born(number, size, operator):
                index = next(counts.setdefault(key, itertools.count()))
                place[number] = (*key, index)
                category = "gradients" if number in owned else "casts" if operator == CAST else part
                steps.append(("+", index, size, category))
            case Died(number):
                if number in place:
                    steps.append(("-", *place[number]))
            case Mark(text):
                name, _, subject = text.partition(" ")
                if name == "gradient":
                    storage = gradients.get(subject)
                    steps.append(("g", *grouped[subject], *place.get(storage or 0, ("", "", -1))))
                    continue
                key, part = _after(name, subject, key, part, layers)
                if not subject.isdigit():
                    sections.setdefault(key, []).append(("m", name, subject))
    return {key: tuple(_ordered(steps)) for key, steps in sections.items()}


def _ordered(steps: Sequence[Step]) -> Iterator[Step]:
    """Sort the deaths at one moment: Python's own order differs from one trace to the next."""
    for dying, run in itertools.groupby(steps, lambda step: step[0] == "-"):
        together = list(run)
        yield from sorted(together) if dying else together


def _after(name: str, subject: str, key: tuple[str, str], part: str, layers: int) -> tuple[tuple[str, str], str]:
    """Section and category from a mark onward. A layer's section lasts until the next one begins."""
    phase = key[0]
    match name, subject:
        case (("backward" | "input"), _):
            return (name[0], "end"), "loss"
        case (("weights" | "weights_of"), _):
            return ("w", subject or "begin"), "workspace"
        case ("loss", _) | ("forward_exit", "root"):
            return ("f", "end"), "loss"
        case "forward_enter", "head":
            return key, "loss"
        case "backward_exit", "head":
            return key, "workspace"
        case "forward_exit", _ if subject == str(layers - 1) and phase == "f":
            return ("f", "end"), "activations"
        case ("backward_exit", "0") | ("backward_enter", "embedding"):
            return (phase, "begin"), "workspace"
        case "forward_enter", _ if subject.isdigit() and phase == "f":
            return ("f", subject), "activations"
        case "backward_enter", _ if subject.isdigit():
            return (phase, subject), "workspace"
    return key, part
