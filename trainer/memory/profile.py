"""What one micro-batch does to memory, as data: the anatomy of a model and the trace of its units. Torch-free.

A profile is made once per architecture, shape and dtypes by `trace` (which runs the model's own code on fake
tensors) and kept on disk; everything that an estimate does afterwards is arithmetic on it.

    sections of a trace      begin | layer 0 | ... | end (norm, head, loss) || end | ... | layer 0 | begin
                             ------------ forward ------------------------    ------- backward -------

Of layers that are alike three are traced: the first, one in the middle, the last. `timeline` repeats the middle one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

Step = tuple[Any, ...]
"""One entry of a section:
("+", number, bytes, category)      a storage is born
("-", phase, section, number)       a storage dies; phase and section: where it was born
("g", group, parameter, number)     a parameter's gradient of this micro-batch is complete, in that storage
("m", event, group)                 forward enters or leaves a group, or backward does: see `MARKS`
Numbers count the births of a section from 0.
"""

MARKS = ("forward_enter", "forward_exit", "loss", "backward", "backward_enter", "backward_exit")


@dataclass(frozen=True, slots=True)
class Parameter:
    """name: inside its group. shape: on one tensor-parallel rank."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The model's parameters in groups, tied ones once.

    kinds: the parameters of one decoder layer, for each kind of layer. layers: each layer's kind, in order.
    groups: "embedding" and "head" where they are groups of their own, "root" with the rest.
    buffers_bytes: tensors that are no parameters (rotary tables).
    """

    kinds: tuple[tuple[Parameter, ...], ...]
    layers: tuple[int, ...]
    groups: tuple[tuple[str, tuple[Parameter, ...]], ...]
    buffers_bytes: int
    name: str

    def all_groups(self) -> Iterator[tuple[str, tuple[Parameter, ...]]]:
        """Every group with its parameters, in the order of the forward: layers are "0", "1", ..."""
        named = dict(self.groups)
        yield "root", named["root"]
        if "embedding" in named:
            yield "embedding", named["embedding"]
        for index, kind in enumerate(self.layers):
            yield str(index), self.kinds[kind]
        if "head" in named:
            yield "head", named["head"]

    def group(self, name: str) -> tuple[Parameter, ...]:
        return self.kinds[self.layers[int(name)]] if name.isdigit() else dict(self.groups).get(name, ())

    def parameters(self) -> Iterator[Parameter]:
        for _, parameters in self.all_groups():
            yield from parameters

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters())


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward and backward of the shortened model. templates: the kind of each traced layer.

    sections: ("f", "begin"), ("f", "0"), ..., ("f", "end"), ("b", "end"), ..., ("b", "0"), ("b", "begin").
    """

    templates: tuple[int, ...]
    sections: dict[tuple[str, str], tuple[Step, ...]]

    def template_of(self, layer: int, layers: tuple[int, ...]) -> int:
        """The traced layer that stands for a layer of the model: the ends for the ends, the middle for the rest."""
        alike = [index for index, kind in enumerate(self.templates) if kind == layers[layer]]
        if layer == 0 and alike[0] == 0:
            return 0
        if layer == len(layers) - 1 and alike[-1] == len(self.templates) - 1:
            return alike[-1]
        return alike[len(alike) // 2]


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """What the optimizer does, measured on small tensors. Bytes per byte of the parameters it updates.

    state: kept for good. state_constant: bytes per parameter tensor besides. temporary_all: beyond that during the
    update, per byte of all parameters of a group; temporary_largest: per byte of its largest parameter.
    """

    state: float
    state_constant: int
    temporary_all: float
    temporary_largest: float


@dataclass(frozen=True, slots=True)
class Profile:
    anatomy: Anatomy
    trace: Trace
    update: UpdateCost

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["trace"]["sections"] = [[*key, steps] for key, steps in self.trace.sections.items()]
        return values


def profile_from_json(values: dict[str, Any]) -> Profile:
    anatomy, trace = values["anatomy"], values["trace"]
    return Profile(
        anatomy=Anatomy(
            kinds=tuple(_parameters(kind) for kind in anatomy["kinds"]),
            layers=tuple(anatomy["layers"]),
            groups=tuple((name, _parameters(items)) for name, items in anatomy["groups"]),
            buffers_bytes=anatomy["buffers_bytes"],
            name=anatomy["name"],
        ),
        trace=Trace(
            templates=tuple(trace["templates"]),
            sections={(phase, name): tuple(tuple(step) for step in steps) for phase, name, steps in trace["sections"]},
        ),
        update=UpdateCost(**values["update"]),
    )


def _parameters(items: list[dict[str, Any]]) -> tuple[Parameter, ...]:
    return tuple(Parameter(item["name"], tuple(item["shape"]), item["trainable"]) for item in items)
