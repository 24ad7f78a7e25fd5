"""Splits a Hugging Face decoder into pipeline stages, without knowledge of its architecture.

Each stage is the whole model without the parts of other stages, so every parameter keeps its name. The model's own code
runs on every stage: it builds masks and rotary tables from shapes and positions alone, so each stage makes its own. If
it calls a part that is on another stage, a placeholder answers:

    the model's code        stage 0             stage 1               last stage
    embedding, positions    held                "received"            "received"
    layer 0, 1              held                -> received           -> received
    layer 2, 3              sends its input     held                  -> received
    layer 4, 5              passes on           sends its input       held
    norm                    passes on           passes on             held
    head                    not called          not called            held --> logits

The model's output before the stage's first layer is discarded: a placeholder for the previous layer returns the hidden
states that the previous stage sent. Slicing the list of layers would be simpler, but wrong if a layer's number chooses
its attention (Gemma 2, GPT-OSS); feeding embeddings to a slice would scale, shift or normalise them again on every
stage.

Which parts come before and after the layers: `probe`. Messages between stages: `pipeline`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError, PlanError
from trainer.axes.pipeline.probe import Examined, count_costs, examine, first_argument
from trainer.axes.pipeline.table import (
    check_split,
    default_stages_per_rank,
    split_layers,
    stages_of_rank,
)
from trainer.model.build import Elsewhere, decoder_layers, tied_names


@dataclass(slots=True)
class Border:
    """The hidden states at the entry and exit of a stage's layers. dtype: in which they are sent; None: as the last
    layer returned them."""

    dtype: torch.dtype | None = None
    received: torch.Tensor | None = None
    sent: torch.Tensor | None = None

    def answer(self) -> torch.Tensor:
        assert self.received is not None
        return self.received

    def blank(self, shape: tuple[int, ...]) -> torch.Tensor:
        """For code whose result is dropped. Memory of its own: some models scale embeddings in place. shape: after
        [batch, seq]."""
        received = self.answer()
        return received.new_zeros((*received.shape[:2], *shape))

    def capture(self, hidden: torch.Tensor) -> torch.Tensor:
        self.sent = hidden
        return torch.zeros_like(hidden, requires_grad=False)

    def take(self) -> torch.Tensor:
        hidden, self.sent, self.received = self.sent, None, None
        assert hidden is not None, "the model did not call the layer after this stage's last"
        hidden = hidden.to(self.dtype or hidden.dtype)
        # Sent as one block of memory, and detached in place after the backward: a view allows neither.
        return hidden.clone(memory_format=torch.contiguous_format) if hidden._is_view() else hidden.contiguous()


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of the pipeline.

    module: the model with this stage's parts. It takes input_ids [batch, seq] on the first stage and hidden states
    [batch, seq, *hidden] on the others, and returns hidden states, on the last stage logits.
    tied: names of the parameters of which the first and the last stage each have a copy; if the parts before the layers
    are `repeated`, every stage has one and also takes `tokens`.
    lengths: number of layers of each stage."""

    module: PreTrainedModel
    index: int
    count: int
    layers: range
    lengths: tuple[int, ...]
    hidden: tuple[int, ...]
    tied: tuple[str, ...]
    repeated: bool = False
    border: Border = field(default_factory=Border)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def copies(self) -> frozenset[str]:
        """Names of parameters that belong to the first stage: not counted, saved or exported from here."""
        return frozenset() if self.is_first else frozenset(self.tied)


class Substitute(Elsewhere):
    """Answers a call of the module that it replaces, from the call's first argument. It has the module's plain
    attributes, which some models read (a layer's attention type), and its parts as empty names, to which a model's list
    of tied weights may refer (`cls.predictions.decoder`)."""

    answer: Callable[[Any], Any]

    def __init__(self, original: nn.Module, answer: Callable[[Any], Any], *, parts: bool = False) -> None:
        super().__init__()
        plain = {
            name: value for name, value in vars(original).items() if not name.startswith("_") and name != "forward"
        }
        self.__dict__.update({**plain, "answer": answer})
        for name, part in original.named_children() if parts else ():
            self.add_module(name, Substitute(part, answer, parts=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(first_argument(args, kwargs))


def split_model(
    model: PreTrainedModel,
    *,
    schedule: str,
    pp: int,
    rank: int,
    stages_per_rank: int | None = None,
    split: Sequence[int] | None = None,
) -> list[Stage]:
    """The stages of pipeline rank `rank`, ascending, each with its own modules on the meta device.

    model: on the meta device; it is not changed. Raises ConfigError for a model that cannot be split, PlanError for too
    few layers or a split that does not fit.
    """
    per_rank = stages_per_rank or default_stages_per_rank(schedule)
    count, num_layers = pp * per_rank, len(decoder_layers(model))
    problems = list(check_split(num_layers, count, split)) if split is not None else []
    if num_layers < count:
        problems = [f"parallel.pp={pp}: the model has {num_layers} layers, {count} stages need as many; use fewer"]
    if problems:
        raise PlanError(*problems)
    anatomy = examine(model)
    if anatomy.repeated and per_rank > 1:
        raise PlanError(
            f"parallel.pipeline.schedule={schedule}: layers of a {type(model).__name__} get embeddings of their own,"
            f" which each stage repeats, and here a rank holds {per_rank} stages; use gpipe or 1f1b"
        )
    layer_costs, head_cost = count_costs(model, anatomy)
    ranges = split_layers(num_layers, count, layer_costs=layer_costs, head_cost=head_cost, split=split)
    if idle := [index for index in range(count) if not _trains(model, anatomy, ranges, index)]:
        layers = ranges[idle[0]]
        raise PlanError(
            f"parallel.pp={pp}: stage {idle[0]} has layers {layers.start} to {layers.stop - 1}, of which nothing is"
            " trained; train something of each stage, set parallel.pipeline.split, or use parallel=fsdp"
        )
    owned = stages_of_rank(schedule, pp=pp, rank=rank, stages_per_rank=per_rank)
    return [build_stage(model, anatomy, ranges, index) for index in owned]


def _trains(model: PreTrainedModel, anatomy: Examined, ranges: list[range], index: int) -> bool:
    """Whether the stage has a trained parameter."""
    stack = decoder_layers(model)
    modules = [stack[number] for number in ranges[index]]
    ends = (anatomy.before if index == 0 else ()), (anatomy.after if index == len(ranges) - 1 else ())
    modules += [model.get_submodule(name) for names in ends for name in names]
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def build_stage(model: PreTrainedModel, anatomy: Examined, ranges: Sequence[range], index: int) -> Stage:
    """Copy the model, and replace every part of another stage in the copy by a placeholder."""
    layers, first, last = ranges[index], index == 0, index == len(ranges) - 1
    border = Border()
    returns = anatomy.returns
    repeated, tied = anatomy.repeated, _tied_over_the_ends(model, anatomy)
    if repeated:
        owners = dict.fromkeys(anatomy.before)
        tied = tuple(sorted(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in owners))
    held = {name.rpartition(".")[0] for name in tied}  # the last stage keeps the embedding whose weight its head uses
    answers: dict[int, Callable[[Any], Any]] = {}
    for number, layer in enumerate(decoder_layers(model)):
        if number < layers.start:
            answers[id(layer)] = lambda _: returns(border.answer())
        elif number == layers.stop:
            answers[id(layer)] = lambda hidden: returns(border.capture(hidden))
        elif number > layers.stop:
            answers[id(layer)] = returns
    for name in anatomy.before:
        if not first and not repeated and not (last and name in held):
            answers[id(model.get_submodule(name))] = lambda _: border.blank(anatomy.embedded)
    for name in anatomy.after:
        if not last:
            answers[id(model.get_submodule(name))] = lambda hidden: hidden
    # deepcopy uses the memo's entry instead of a copy. The config stays one object for all stages.
    memo: dict[int, Any] = {id(model.config): model.config}
    of_layers = {id(layer) for layer in decoder_layers(model)}
    memo.update(
        {
            id(m): Substitute(m, answers[id(m)], parts=id(m) not in of_layers)
            for m in model.modules()
            if id(m) in answers
        }
    )
    module = copy.deepcopy(model, memo)
    _set_forward(module, border, anatomy, first=first, last=last)
    return Stage(
        module=module,
        index=index,
        count=len(ranges),
        layers=layers,
        lengths=tuple(map(len, ranges)),
        hidden=anatomy.hidden,
        tied=tied if first or last or repeated else (),
        repeated=repeated,
        border=border,
    )


def _set_forward(module: PreTrainedModel, border: Border, anatomy: Examined, *, first: bool, last: bool) -> None:
    """Give the module the forward of a stage. Non-last stages stop at the base model, before the head."""
    body: Callable[..., Any] = module.forward if last or module.base_model is module else module.base_model

    def forward(
        inputs: torch.Tensor, tokens: torch.Tensor | None = None, targets: object = None, **kwargs: Any
    ) -> torch.Tensor:
        if first:
            output = body(input_ids=inputs, use_cache=False, **kwargs)
        else:
            border.received = inputs
            given = {"input_ids": tokens} if anatomy.repeated else {"inputs_embeds": border.blank(anatomy.embedded)}
            output = body(**given, use_cache=False, **kwargs)
        if not last:
            return border.take()
        border.received = None
        return output.logits

    module.forward = forward


def _tied_over_the_ends(model: PreTrainedModel, anatomy: Examined) -> tuple[str, ...]:
    """Parameters of `before` that a module of `after` shares. Raises ConfigError for ties of another kind."""

    def place(name: str) -> str:
        owner = name.rpartition(".")[0]
        return "before" if owner in anatomy.before else "after" if owner in anatomy.after else "layers"

    ties = tied_names(model)
    for alias, owner in ties.items():
        if (place(owner), place(alias)) not in (("before", "after"), ("before", "before"), ("after", "after")):
            raise ConfigError(
                f"model: {type(model).__name__} shares {owner} with {alias}, across pipeline stages; use parallel.pp=1"
            )
    return tuple(sorted({owner for alias, owner in ties.items() if place(owner) != place(alias)}))
