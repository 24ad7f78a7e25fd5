"""Tensor and sequence parallel inside a decoder layer: where the ranks' data diverges, and where it is joined.

    tensor parallel                   hidden states: whole, the same on every rank
        norm -> enter [ attention ] leave -> + -> norm -> enter [ MLP ] leave -> +

    with sequence parallel            hidden states: this rank's seq_len / t tokens of every sequence
        norm -> enter_sequence [ attention ] leave_sequence -> + -> norm -> enter_sequence [ MLP ] leave_sequence -> +

A region is a child of the layer that holds divided matrices. Sequence parallel (Korthikanti et al. 2022) sends the
same bytes and stores norms, dropout and residuals, which every rank would otherwise compute and store alike, at 1/t.
The stage's first layer splits the hidden states and its last one joins them, so that embedding, masks, rotary tables,
final norm, head and the neighbouring stages see whole sequences.

Not every region can be entered once for all its matrices: if a part of it is undivided on every rank (a router, a
latent projection), the gradient of that part is complete already and must not be summed. Such a region is entered at
each divided matrix; under sequence parallel it runs on joined sequences and splits its result.

A block of experts that another axis has divided works on each token separately. Under sequence parallel it runs on this
rank's part of the tokens: router and experts without the other ranks of tp, shared experts as a region inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from configs.errors import ConfigError
from trainer.axes.tensor.collectives import Ranks
from trainer.axes.tensor.plans import ADAPTERS, STYLES, split_style
from trainer.model.layers import is_transposed

Forward = Callable[..., Any]
Kind = Literal["nothing", "norm", "divided", "whole", "tokens"]
DIVIDED = {"colwise", "packed_colwise", "rowwise", "replicated_with_grad_allreduce", "channels", "divide"} | ADAPTERS
"""Styles of a fully divided region."""
WHOLE = {"replicate", "replicated_with_grad_allreduce"} | ADAPTERS
"""Styles of modules that every rank has undivided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wiring:
    """Data for the edges. styles: by name of module or parameter. slices: rows of an undivided parameter that this rank
    uses.
    partial: collects the names of parameters with a partial gradient. apart: modules that another axis has divided.
    experts_on_parts: those get this rank's part of the tokens."""

    ranks: Ranks
    styles: Mapping[str, str]
    sequence_parallel: bool
    apart: tuple[str, ...] = ()
    experts_on_parts: bool = False
    rope_dim: int | None = None
    slices: dict[str, slice] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)

    def style(self, name: str) -> str:
        return split_style(self.styles.get(name, "replicate"))[0]


def wire_layer(layer: nn.Module, name: str, wiring: Wiring, *, first: bool, last: bool) -> None:
    """Replace the forwards of a decoder layer and its regions. first, last: among the layers of this stage."""
    ranks, sequence = wiring.ranks, wiring.sequence_parallel
    if sequence:
        wiring.partial.update(f"{name}.{leaf}" for leaf in _own(layer))
    for child_name, child in layer.named_children():
        full = f"{name}.{child_name}"
        kind = _kind(child, full, wiring)
        if kind == "tokens":
            _on_own_tokens(child, full, wiring)
            continue
        if kind == "norm" and sequence:
            wiring.partial.update(f"{full}.{leaf}" for leaf, _ in child.named_parameters())
        divided = kind == "divided"
        for module_name, module in child.named_modules(prefix=full):
            wire_module(module, module_name, wiring, entered=divided, cut=1 if sequence and divided else None)
        if divided:
            _enter_once(child, full, wiring, cut=1 if sequence else None)
        elif kind == "whole" and sequence:
            child.forward = _edges(child.forward, ranks.join, ranks.split)
    forward = run_on_local_parts(layer, name, wiring)
    if sequence:
        forward = _edges(forward, ranks.split if first else None, ranks.join if last else None)
    layer.forward = forward


def _enter_once(region: nn.Module, name: str, wiring: Wiring, *, cut: int | None) -> None:
    """Enter a fully divided region at its edge. cut: the dimension along which its input is divided; None: none."""
    ranks = wiring.ranks
    if any(wiring.style(n) in ("colwise", "packed_colwise") for n, _ in region.named_modules(prefix=name)):
        enter = ranks.enter if cut is None else partial(ranks.enter_sequence, dim=cut)
        region.forward = _entered(region.forward, enter)


def _on_own_tokens(block: nn.Module, name: str, wiring: Wiring) -> None:
    """Run a block of experts on this rank's tokens. Its shared experts, which are divided, are entered and left along
    the first dimension of their input, [tokens, ...] or [batch, ...]: inside, the tokens have another order, which no
    MLP depends on. Raises ConfigError for other divided matrices."""
    entered: tuple[str, ...] = ()
    for child_name, child in block.named_modules(prefix=name):
        if f"{child_name}.".startswith(entered) or child_name.startswith(wiring.apart):
            continue
        if child is not block and _kind(child, child_name, wiring) == "divided":
            entered += (f"{child_name}.",)
            for module_name, module in child.named_modules(prefix=child_name):
                wire_module(module, module_name, wiring, entered=True, cut=0)
            _enter_once(child, child_name, wiring, cut=0)
        elif (style := wiring.style(child_name)) in WHOLE:
            wiring.partial.update(f"{child_name}.{leaf}" for leaf in _own(child))
        else:
            raise ConfigError(
                f"parallel.sequence_parallel=true: {child_name} is {style} next to experts that parallel.ep divides,"
                " and cannot run on parts of a sequence; use parallel.sequence_parallel=false"
            )


def wire_module(module: nn.Module, name: str, wiring: Wiring, *, entered: bool, cut: int | None) -> None:
    """Give a planned module the edges of its style. entered: its input has passed `enter` already. cut: the dimension
    along which its sum is left divided; None: its sum is left complete."""
    ranks, style = wiring.ranks, wiring.style(name)
    if style in ("colwise", "packed_colwise", "vocabulary"):
        if is_transposed(module):
            # Conv1D uses this number, not the weight's, for the shape of its result.
            module.nf = -1
        if not entered:
            module.forward = _edges(module.forward, ranks.enter)
    elif style == "colwise_gather_output":
        module.forward = _edges(module.forward, ranks.enter, lambda y: ranks.join(y, dim=-1))
    elif style in ("rowwise", "rowwise_split_input"):
        leave = ranks.leave if cut is None else partial(ranks.leave_sequence, dim=cut)
        if cut is not None and "bias" in _own(module):
            wiring.partial.add(f"{name}.bias")
        module.forward = _row_forward(module, leave)
        if style == "rowwise_split_input":
            module.forward = _edges(module.forward, lambda x: ranks.split(x, dim=-1))
    elif (
        style == "replicated_with_grad_allreduce"
        or (style == "adapter_before_columns" and entered)
        or (style == "adapter_after_rows" and cut is not None)
    ):
        wiring.partial.update(f"{name}.{leaf}" for leaf in _own(module))
    elif style == "embedding_colwise":
        module.forward = _edges(module.forward, None, lambda y: ranks.join(y, dim=-1))
    elif style in ("moe_tp_experts", "all_reduce"):
        module.forward = _summed_forward(module.forward, ranks)
    elif style == "moe_identity_expert":
        # The sum over ranks that follows the experts would count it once per rank.
        module.forward = _edges(module.forward, lambda x: x / ranks.size)
    elif style == "mla_kv_a_proj":
        module.forward = _latent_forward(module.forward, ranks, wiring.rope_dim)


def run_on_local_parts(module: nn.Module, name: str, wiring: Wiring, *, recurse: bool = True) -> Forward:
    """The module's forward, during which each of its parameters is replaced by this rank's plain part.

    The parameters are looked up at each call, because sharding replaces them between calls.
    """
    inner = module.forward
    places = []
    for owner_name, owner in module.named_modules(prefix=name) if recurse else [(name, module)]:
        for leaf in _own(owner) if owner_name not in wiring.apart else ():
            full = f"{owner_name}.{leaf}"
            once = wiring.style(full) == "added_once"
            if once or wiring.style(full) == "replicated_with_grad_allreduce":
                wiring.partial.add(full)
            places.append((owner._parameters, leaf, wiring.slices.get(full), once))

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept = [(table, leaf, table[leaf]) for table, leaf, _, _ in places]
        try:
            for (table, leaf, rows, once), (_, _, parameter) in zip(places, kept, strict=True):
                part: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                part = part if rows is None else part[rows]
                table[leaf] = part / wiring.ranks.size if once else part
            return inner(*args, **kwargs)
        finally:
            for table, leaf, parameter in kept:
                table[leaf] = parameter

    return forward


def _kind(child: nn.Module, name: str, wiring: Wiring) -> Kind:
    """norm: works on each token separately. tokens: a block of experts, which does so too. divided: every parameter
    belongs to a divided matrix or head. whole: at least one parameter is undivided and may see other tokens."""
    if wiring.experts_on_parts and any(other.startswith(f"{name}.") for other in wiring.apart):
        return "tokens"
    owned = {
        full if (full := f"{owner_name}.{leaf}") in wiring.styles else owner_name
        for owner_name, owner in child.named_modules(prefix=name)
        for leaf in _own(owner)
    }
    if not owned:
        return "nothing"
    planned = {module_name for module_name, _ in child.named_modules(prefix=name) if module_name in wiring.styles}
    styles = {wiring.style(each) for each in owned | planned}
    if all(STYLES[style].cut == "none" for style in styles):
        return "norm" if all(p.ndim <= 1 for p in child.parameters()) else "whole"
    return "divided" if styles <= DIVIDED else "whole"


def _edges(inner: Forward, before: Forward | None = None, after: Forward | None = None) -> Forward:
    """`inner`, with `before` applied to its hidden states and `after` to those that it returns."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            if args:
                args = (before(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": before(kwargs["hidden_states"])}
        result = inner(*args, **kwargs)
        if after is None:
            return result
        return (after(result[0]), *result[1:]) if isinstance(result, tuple) else after(result)

    return forward


def _entered(inner: Forward, enter: Forward) -> Forward:
    """`inner`, whose ranks compute different parts from the hidden states, which some models pass as query, key and
    value. Its other inputs, such as a residual to add, are the same on every rank."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        entered = enter(hidden)
        args = tuple(entered if value is hidden else value for value in args)
        return inner(*args, **{name: entered if value is hidden else value for name, value in kwargs.items()})

    return forward


def _row_forward(module: nn.Module, leave: Forward) -> Forward:
    """A matrix of which each rank holds rows: the layer's own forward without its bias, the sum, and the bias once."""
    inner: Forward = module.forward
    own: dict[str, Any] = module._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = own["bias"]
        # A Conv1D adds its bias in the matmul itself, and cannot do without one.
        own["bias"] = x.new_zeros(bias.shape) if bias is not None and is_transposed(module) else None
        try:
            total = leave(inner(x))
        finally:
            own["bias"] = bias
        return total if bias is None else total + bias

    return forward


def _summed_forward(inner: Forward, ranks: Ranks) -> Forward:
    """Experts, called with hidden states, expert indices and weights. Each rank uses the router's weights for its part
    of every expert, so their gradient is a sum over ranks, like that of the hidden states."""

    def enter(value: Any) -> Any:
        return ranks.enter(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ranks.leave(inner(*map(enter, args), **{name: enter(value) for name, value in kwargs.items()}))

    return forward


def _latent_forward(inner: Forward, ranks: Ranks, rope_dim: int | None) -> Forward:
    """The first projection of latent attention (DeepSeek-V2): its last `rope_dim` features go to every head, and each
    rank has only some heads; the others pass a further projection, which is entered separately."""
    if rope_dim is None:
        raise ConfigError("parallel.tensor_plan: mla_kv_a_proj needs a model config with qk_rope_head_dim")

    def forward(x: torch.Tensor) -> torch.Tensor:
        latent, rope = inner(x).tensor_split([-rope_dim], dim=-1)
        return torch.cat([latent, ranks.enter(rope)], dim=-1)

    return forward


def _own(module: nn.Module) -> Iterator[str]:
    """Names of the module's own parameters."""
    return (leaf for leaf, parameter in module._parameters.items() if parameter is not None)
