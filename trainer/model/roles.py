"""The role of each parameter in its model, found once from the modules, for optimizers, estimates and checkpoints.

    role         what it is                                                       matrices inside
    matrix       the weight of a linear layer                                     one
    packed       several linear layers stored as one weight (query, key, value)   one per layer
    experts      a stack [expert, ..., ...] of linear layers                      one or two per expert
    embedding    a table that tokens or positions look up, tied to the head or not
    head         what scores the vocabulary
    router       what chooses the experts of a token
    vector       everything else, element by element: norms, biases, convolutions

No property of a module shows which weights are packed: PACKED lists them by architecture, and transformers' own
tensor-parallel plans mark others. The plans of `axes.tensor` read the same table. Weights whose parts alternate head by
head (gpt_neox, bloom, falcon) or feature by feature (gpt_oss's experts) count as one matrix: no block of their rows is
one of the layers. Importing this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any

from trainer.plan.model_fields import CHOSEN, EXPERTS
from trainer.plan.views import DENSE, EXPERT

if TYPE_CHECKING:
    import torch
    from torch import nn


class Role(StrEnum):
    matrix = "matrix"
    packed = "packed"
    experts = "experts"
    embedding = "embedding"
    head = "head"
    router = "router"
    vector = "vector"


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrices:
    """How a parameter is split into matrices.

    parts: sizes of the packed matrices along `dim` of the parameter; empty for one matrix.
    transposed: stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    stacked: 3-D experts [expert, a, b].
    """

    parts: tuple[int, ...] = ()
    dim: int = 0
    transposed: bool = False
    stacked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """One parameter. shape: of the undivided parameter. matrices: None if the role has none. routed: for routed experts
    the number of experts per token, and in total; None for a parameter that every token uses.

    view: of the ranks (`trainer.plan.views`) along whose axes it is divided: experts and their biases have their own,
    if the plan has it.

    of: for a piece, the whole parameter's shape.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = Role.vector
    matrices: Matrices | None = None
    routed: tuple[int, int] | None = None
    view: str = DENSE
    of: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """Its shape before it was divided."""
        return self.of or self.shape

    @property
    def active(self) -> int:
        """Number of its values that one token uses."""
        return met(self.numel, self.routed)

    def cut(self, shape: tuple[int, ...]) -> Described:
        """One rank's part of it."""
        return replace(self, shape=shape, of=self.whole)


INNER = "base_layer"
"""peft's name of the module inside an adapter."""
HEADS = "heads"
"""Query, key and value in one weight, whose sizes are those of the heads."""
PACKED: dict[str, dict[str, int | str]] = {
    "gpt2": {"transformer.h.*.attn.c_attn": 3},
    "phi3": {"model.layers.*.self_attn.qkv_proj": HEADS, "model.layers.*.mlp.gate_up_proj": 2},
    "glm": {"model.layers.*.mlp.gate_up_proj": 2},
    "glm4": {"model.layers.*.mlp.gate_up_proj": 2},
}
"""By model_type and module: number of equal parts of its output features, or HEADS."""


def met(numel: int, routed: tuple[int, int] | None) -> int:
    """See `Described.active`."""
    return numel if routed is None else numel * routed[0] // routed[1]


def wildcard(name: str) -> str:
    """A name with `*` for numbers: model.layers.3.mlp -> model.layers.*.mlp."""
    return ".".join("*" if word.isdigit() else word for word in name.split("."))


def describe(model: nn.Module, plan: Mapping[str, str] | None = None) -> dict[str, Described]:
    """Every parameter by name, a tied one under each of its names. The model may be a pipeline stage, and its
    parameters
    DTensors: their undivided shape counts.

    plan: `parallel.tensor_plan`, which may declare that a matrix holds several.
    """
    from torch import nn

    from trainer.model.layers import values_shape

    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    ends: Any = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(p) for p in (ends.parameters() if isinstance(ends, nn.Module) else ()) if p.ndim == 2}
    routers, routed = set(_routers(model)), routed_parts(model)
    packing = _Packing(model, plan or {})
    found: dict[str, Described] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        stacked = stack_of(module)
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            shape = tuple(values_shape(module, leaf, parameter))
            known = {id(parameter)}
            role = Role.vector
            matrices = None
            if known & tables:
                role = Role.embedding
            elif known & heads:
                role = Role.head
            elif known & routers:
                role = Role.router
            else:
                role, matrices = packing.of(module, prefix, leaf, shape)
            view = EXPERT if stacked and shape[:1] == (stacked,) else DENSE
            chosen = routed.get(id(parameter))
            found[name] = Described(name=name, shape=shape, role=role, matrices=matrices, routed=chosen, view=view)
    return found


def stack_of(module: nn.Module) -> int:
    """Number of experts that the module holds in its own stacked parameters, as transformers runs them; 0 for
    others."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or not hasattr(module, "is_concatenated"):
        return 0
    # A divided stack counts only its own experts; its parameters know the total.
    lengths = {p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3}
    return next(iter(lengths)) if len(lengths) == 1 and next(iter(lengths)) % count == 0 else 0


class _Packing:
    """Which matrices the parameters of linear layers and stacked experts hold."""

    def __init__(self, model: nn.Module, plan: Mapping[str, str]) -> None:
        self.text = _text(model)
        self.table = PACKED.get(getattr(getattr(model, "config", None), "model_type", ""), {})
        # The content of a matrix does not change with other settings of the user.
        packed = {name: style for name, style in plan.items() if style.startswith("packed")}
        self.styles: Mapping[str, str] = {**(getattr(model, "tp_plan", None) or {}), **packed}

    def of(self, module: nn.Module, prefix: str, leaf: str, shape: tuple[int, ...]) -> tuple[Role, Matrices | None]:
        from trainer.model.layers import is_linear, is_transposed

        name = f"{prefix}.{leaf}"
        if len(shape) == 2 and is_linear(module) and leaf == "weight":
            transposed = is_transposed(module)
            dim = 1 if transposed else 0
            parts = self._parts(prefix, name, shape[dim])
            return Role.packed if parts else Role.matrix, Matrices(parts=parts, dim=dim, transposed=transposed)
        if len(shape) == 3 and not type(module).__module__.startswith("torch.nn") and 1 not in shape:
            transposed = self._transposed(module, prefix)
            dim = 2 if transposed else 1
            concatenated = getattr(module, "is_concatenated", True)
            parts = self._parts(prefix, name, shape[dim]) if concatenated else ()
            return Role.experts, Matrices(parts=parts, dim=dim, transposed=transposed, stacked=True)
        return Role.vector, None

    def _style(self, name: str) -> str:
        return self.styles.get(name) or self.styles.get(wildcard(name)) or ""

    def _parts(self, prefix: str, name: str, length: int) -> tuple[int, ...]:
        count = self.table.get(wildcard(prefix), 0)
        if isinstance(count, str):
            heads, text = self.text.num_attention_heads, self.text
            key_value = getattr(text, "num_key_value_heads", None) or heads
            size = length // (heads + 2 * key_value)
            return heads * size, key_value * size, key_value * size
        style = next((style for style in (self._style(name), self._style(prefix)) if style.startswith("packed")), "")
        count = count or (int(style.partition(":")[2] or 2) if style else 1)
        return (length // count,) * count if count > 1 else ()

    def _transposed(self, module: nn.Module, prefix: str) -> bool:
        """Experts stored [expert, in, out]: according to the module, or because the plan packs them along the last
        dimension."""
        if hasattr(module, "is_transposed"):
            return bool(module.is_transposed)
        return any(self._style(f"{prefix}.{leaf}").startswith("packed_rowwise") for leaf in module._parameters)


def _routers(model: nn.Module) -> Iterator[int]:
    """Ids of the weights next to a module of experts that score each of them, or of the one that all tokens share."""
    counts = _counts(model)
    for _, block, experts in _blocks(model):
        inside = {id(p) for child in experts for p in child.parameters()}
        for parameter in block.parameters():
            if parameter.ndim == 2 and id(parameter) not in inside and parameter.shape[0] in {*counts, 1}:
                yield id(parameter)


def routed_parts(model: nn.Module) -> dict[int, tuple[int, int]]:
    """For each parameter of routed experts, by id: the number of experts per token, and in total."""
    found: dict[int, tuple[int, int]] = {}
    for name, _, experts in _blocks(model):
        chosen = _chosen(model, name)
        for child in experts if chosen else ():
            count = _expert_count(child, _counts(model))
            found |= {id(parameter): (min(chosen, count), count) for parameter in child.parameters()}
    return found


def _counts(model: nn.Module) -> set[int]:
    """Numbers of experts that the config names."""
    text = _text(model)
    return {count for field in EXPERTS if isinstance(count := getattr(text, field, None), int) and count > 1}


def _chosen(model: nn.Module, name: str) -> int:
    """Experts per token in the layer of this name; 0 if the config does not give it."""
    text = _text(model)
    value = next((value for field in CHOSEN if (value := getattr(text, field, None))), 0)
    if isinstance(value, list):  # one for each layer
        layer = next((int(word) for word in name.split(".") if word.isdigit()), 0)
        return value[min(layer, len(value) - 1)]
    return value


def _text(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Each module with routed experts below it, with its name."""
    from torch import nn

    from trainer.model.build import decoder_layers

    counts = _counts(model)
    if not counts:
        return
    layers = decoder_layers(model)
    for name, block in model.named_modules():
        experts = [child for child in block.children() if child is not layers and _expert_count(child, counts)]
        if experts and not isinstance(block, nn.ModuleList) and INNER not in block._modules:
            yield name, block, experts


def _expert_count(module: nn.Module, counts: set[int]) -> int:
    """Number of routed experts in a module; 0 for any other module."""
    from torch import nn

    if isinstance(module, nn.ModuleList):
        return len(module) if len(module) in counts else 0
    shapes = [_whole(p) for p in innermost(module)._parameters.values() if p is not None]
    return next((shape[0] for shape in shapes if len(shape) == 3 and shape[0] in counts), 0)


def innermost(module: nn.Module) -> nn.Module:
    """The module itself, or the one that peft has put adapters around, one around the other."""
    return innermost(module.get_submodule(INNER)) if INNER in module._modules else module


def _whole(parameter: torch.Tensor) -> tuple[int, ...]:
    """Its shape, even if DeepSpeed has left only a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
