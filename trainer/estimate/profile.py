"""The memory of one micro-batch, as data: the anatomy of a model and the trace of its units. Torch-free.

`trace` makes a profile once per architecture, shape and dtypes: it runs the model's own code on fake
tensors. Profiles are kept on disk; everything that an estimate does afterwards is arithmetic on them.

    sections of a trace      begin | layer 0 | ... | end (norm, head, loss) || end | ... | layer 0 | begin
                             ------------ forward ------------------------    ------- backward -------

Of layers that are alike three are traced: the first, a middle one and the last. `compose` repeats the middle one.
A model that one rank holds whole is one part. Of a pipeline three kinds of stages are traced, each as a part of its
own: the first, a middle one and the last. Under tensor parallel everything here is the part of one rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import repeat
from math import prod
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from trainer.model.roles import Described, met

Step = tuple[Any, ...]
"""One entry of a section:
("+", number, bytes, category)      a storage is born
("-", phase, section, number)       a storage dies; phase and section: where it was born
("g", group, parameter, number)     a parameter's gradient of this micro-batch is complete, in that storage
("m", event, group)                 forward enters or leaves a group, or backward does
Numbers count the births of a section from 0.
"""

UNKNOWN = Described(name="", shape=())


LIKE_LAYERS = 3  # the first, one between two of its kind, the last
WHOLE, FIRST, MIDDLE, LAST = "whole", "first", "middle", "last"


@dataclass(frozen=True, slots=True)
class Parameter:
    """name: inside its group. shape: on one tensor-parallel rank. summed: over whom its gradient is summed once more
    at the end of a step: tensor-parallel ranks, the two "ends" of a pipeline that share it, or nobody. packed: bytes of
    the tensors that hold it where it is quantized. eight_bits: it is multiplied in float8. gathered: bytes per
    value as FSDP2 gathers it; 0: those of the compute dtype. whole: what it is in the model, before tensor parallel
    cuts it."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    summed: str = ""
    packed: tuple[int, ...] = ()
    eight_bits: bool = False
    gathered: int = 0
    whole: Described = UNKNOWN

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def active(self) -> int:
        """Values of this rank's part that a token meets."""
        return met(self.numel, self.whole.routed)


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

    @property
    def active(self) -> int:
        return sum(parameter.active for parameter in self.parameters())

    @property
    def whole(self) -> int:
        """Parameters of the model, before tensor parallel divides them."""
        return sum(parameter.whole.numel for parameter in self.parameters())

    @property
    def whole_active(self) -> int:
        """Those of them that a token meets."""
        return sum(parameter.whole.active for parameter in self.parameters())

    def routing(self) -> str | None:
        """How many experts a token goes to, and in how many layers; None for a model without routed experts."""
        kinds = [next((p.whole.routed for p in kind if p.whole.routed), None) for kind in self.kinds]
        layers = [routed for kind in self.layers if (routed := kinds[kind])]
        said = (
            f"{routed[0]} of {routed[1]} experts in each of {count} layers" for routed, count in Counter(layers).items()
        )
        return ", ".join(said) or None

    def frozen_tensors(self, width: int) -> Iterator[int]:
        """Bytes of each tensor that is only held, `width` per value where it is not packed into other tensors."""
        for parameter in self.parameters():
            if not parameter.trainable:
                yield from parameter.packed or (parameter.numel * width,)


@dataclass(frozen=True, slots=True)
class Trace:
    """One forward and backward of a shortened part. templates: the kind of each traced layer.

    sections: ("f", "begin"), ("f", "0"), ..., ("f", "end"), ("b", "end"), ..., ("b", "0"), ("b", "begin"). For
    pipeline schedules that split the backward also "i" (gradient of the input) and "w" (of the weights) besides "b".
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
class Part:
    """A whole model, or one kind of pipeline stage. groups, buffers_bytes: what it holds besides its layers."""

    groups: tuple[tuple[str, tuple[Parameter, ...]], ...]
    buffers_bytes: int
    trace: Trace


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a model before any part of it is traced: enough to cut it into stages.

    anatomy: of the whole model. layer_costs, head_cost: see `pipeline.probe.count_costs`; empty if it was not asked
    for. hidden_size: features of what one stage sends to the next. layer_buffers_bytes: of a layer of each kind.
    spans: how far each layer with attention sees (`model_fields.attention_spans`). scores: its kernel computes each
    score, masked ones too.
    """

    anatomy: Anatomy
    layer_costs: tuple[float, ...]
    head_cost: float
    hidden_size: int
    layer_buffers_bytes: tuple[int, ...]
    spans: tuple[int | None, ...]
    scores: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """One module that a rank runs: the whole model, or a stage with its own layers."""

    anatomy: Anatomy
    trace: Trace


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """outline and the traced parts by their name (`part_name`)."""

    outline: Outline
    parts: Mapping[str, Part]

    @property
    def anatomy(self) -> Anatomy:
        return self.outline.anatomy

    def stage(self, layers: range, *, stages: int, index: int) -> Profile:
        """The module of one stage; of a model in one piece, stage 0 of 1."""
        whole = self.outline.anatomy
        kinds = whole.layers[layers.start : layers.stop]
        part = self.parts[part_name(kinds, stages=stages, index=index)]
        buffers = part.buffers_bytes + sum(self.outline.layer_buffers_bytes[kind] for kind in kinds)
        anatomy = Anatomy(whole.kinds, kinds, part.groups, buffers, whole.name)
        return Profile(anatomy=anatomy, trace=part.trace)


def role(*, stages: int, index: int) -> str:
    if stages == 1:
        return WHOLE
    return FIRST if index == 0 else LAST if index == stages - 1 else MIDDLE


def part_name(kinds: Sequence[int], *, stages: int, index: int) -> str:
    """The part that stands for a stage whose layers are of these kinds."""
    return f"{role(stages=stages, index=index)} {','.join(str(kinds[place]) for place in kept_layers(kinds))}"


def kept_layers(kinds: Sequence[int]) -> list[int]:
    """Places of the layers that are traced: at most LIKE_LAYERS of each kind, the last layer's kind last."""
    order = [kind for kind in dict.fromkeys(kinds) if kind != kinds[-1]] + [kinds[-1]]
    chosen = []
    for kind in order:
        found = [place for place, value in enumerate(kinds) if value == kind]
        chosen += found if len(found) <= LIKE_LAYERS else [*found[: LIKE_LAYERS - 1], found[-1]]
    return chosen


def part_to_json(part: Part) -> dict[str, Any]:
    values = asdict(part)
    values["trace"]["sections"] = [[*key, steps] for key, steps in part.trace.sections.items()]
    return values


def part_from_json(values: dict[str, Any]) -> Part:
    trace = values["trace"]
    trace["sections"] = {(phase, name): tuple(map(tuple, steps)) for phase, name, steps in trace["sections"]}
    return from_json(Part, values)


def from_json(kind: Any, value: Any) -> Any:
    """A value of this type, from what `asdict` and JSON have made of it; dictionaries stay as they are."""
    if is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        return cast(Any, kind)(**{name: from_json(hints[name], each) for name, each in value.items()})
    inner = get_args(kind)
    if isinstance(value, list):
        return tuple(map(from_json, repeat(inner[0]) if inner[-1] is Ellipsis else inner, value))
    if get_origin(kind) is UnionType:
        return None if value is None else from_json(inner[0], value)
    return kind(value) if isinstance(kind, type) and issubclass(kind, StrEnum) else value


_hints = cache(get_type_hints)
