"""Derives a tensor-parallel plan for an architecture without one, by experiments on a small copy.

Each layer runs alone, in float64, on the inputs of its call. Every linear layer in it repeats its earlier result,
whatever its input, while one of these results is disturbed. The linear layers whose inputs then change show the
connections between two linear layers without a third:

    q, k, v --> attention --> o          closed: what leaves q, k and v arrives at o alone
    gate, up --> activation --> down     closed
    o --> residual, norm --> gate, up    open: the residual leaves the layer

A closed part is divided ("colwise", then "rowwise") if the results of the ranks' parts, each tried in turn, add up to
the whole layer's result. For code that counts its heads in an attribute, a divided attribute is tried; for packed
matrices, divided blocks; for parameters in between, both whole and divided. Elsewhere a large matrix is still divided,
and its result gathered ("colwise_gather_output") or its input divided ("rowwise_split_input"): matmul and memory are
shared, and every rank computes the rest. `check` then judges the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from trainer.axes.tensor.parts import Layer, Styles
from trainer.axes.tensor.plans import match, share_of
from trainer.model.build import decoder_layers
from trainer.model.layers import is_linear, is_transposed
from trainer.model.miniature import first_that_runs
from trainer.model.peft import is_adapter, plain_name

SMALL = 0.02
"""Minimum size of a layer's matrix that is worth a gather, in parameters."""


def derive(model: PreTrainedModel, tp: int) -> Styles:
    """Styles by name, `*` for numbers; empty if the small copy does not run or nothing can be divided."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "use_cache", "dtype")}
    key = repr((type(model).__name__, tp, sorted(fields.items(), key=str)))
    if key not in _derived:
        _derived.clear()
        _derived[key] = _derive(model, tp)
    return dict(_derived[key])


_derived: dict[str, Styles] = {}


def _derive(model: PreTrainedModel, tp: int) -> Styles:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        try:
            _, layers = first_that_runs(model.config, tp, partial(_layers_of, tp=tp))
        except Exception:
            return {}
        parts = [[(part.linears, part.cut(tp)) for part in layer.closed_parts()] for layer in layers]
        found = _agreed(model, layers, parts, tp)
        return found | _gathered(model, layers, found, tp)


def _layers_of(small: PreTrainedModel, tp: int) -> list[Layer]:
    """A layer of each kind, with the arguments of its call."""
    stack = decoder_layers(small)
    prefix = next(name for name, module in small.named_modules() if module is stack)
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(number, (args, kwargs))

        return hook

    handles = [layer.register_forward_pre_hook(keep(n), with_kwargs=True) for n, layer in enumerate(stack)]
    ids = torch.randint(3, small.config.get_text_config().vocab_size, (2, 4 * tp))
    small(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    kinds = {tuple((name, p.shape) for name, p in stack[n].named_parameters()): n for n in sorted(calls, reverse=True)}
    more = _uses_more(small, stack, ids)
    return [Layer(stack[n], f"{prefix}.{n}", *calls[n], returns_more=more) for n in sorted(kinds.values())]


@torch.no_grad()
def _uses_more(small: PreTrainedModel, stack: nn.ModuleList, ids: torch.Tensor) -> bool:
    """Whether logits depend on a layer's further results; attention weights are ignored."""
    plain = small(input_ids=ids, use_cache=False).logits

    def disturb(_: nn.Module, __: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return output
        return (output[0], *tree_map_only(torch.Tensor, lambda value: value.float() + 1, output[1:]))

    handles = [layer.register_forward_hook(disturb) for layer in stack]
    try:
        return not torch.equal(small(input_ids=ids, use_cache=False).logits, plain)
    except Exception:  # the model's own code, on unexpected values
        return True
    finally:
        for handle in handles:
            handle.remove()


def _agreed(
    model: PreTrainedModel, layers: list[Layer], parts: list[list[tuple[set[str], Styles | None]]], tp: int
) -> Styles:
    """The parts that are divided alike in every layer that calls linear layers of these names."""
    cuts: dict[str, list[Styles]] = {}
    for layer, own in zip(layers, parts, strict=True):
        alike = {name: styles for names, styles in own if styles and _divides(model, styles, tp) for name in names}
        for name in layer.linears:
            cuts.setdefault(layer.full(name), []).append(alike.get(layer.full(name), {}))
    agreed = {name: found[0] for name, found in cuts.items() if found[0] and all(cut == found[0] for cut in found)}
    whole = [styles for styles in agreed.values() if all(styles == agreed.get(name) for name in styles if name in cuts)]
    return {name: style for styles in whole for name, style in styles.items()}


def _divides(model: PreTrainedModel, styles: Styles, tp: int) -> bool:
    """Whether the model's own sizes can be divided so."""
    modules = {plain_name(name): module for name, module in model.named_modules() if not is_adapter(name)}
    found = match(styles, (*modules, *(plain_name(name) for name, _ in model.named_parameters())))
    for name, module in modules.items():
        style = found.get(name, "")
        divided = style.partition(":")[2].split(",") if style.startswith("divide:") else []
        if any(getattr(module, attribute, 0) % tp for attribute in divided):
            return False
        for leaf, parameter in module.named_parameters(recurse=False):
            own = found.get(f"{name}.{leaf}") or style
            share = share_of(own, leaf, parameter.ndim, transposed=is_transposed(module))
            if share.dim is not None and parameter.shape[share.dim] % (tp * share.parts):
                return False
    return True


def _gathered(model: PreTrainedModel, layers: list[Layer], found: Styles, tp: int) -> Styles:
    """Styles of large matrices that no part divides."""
    called = {layer.full(name): (layer, name) for layer in layers for name in layer.linears}
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    styles: Styles = {}
    for layer in decoder_layers(model):
        least = SMALL * sum(p.numel() for p in layer.parameters())
        linears = [m for m in layer.modules() if is_linear(m) and m.weight.numel() >= least]
        patterns = match({name: name for name in called.keys() - found.keys()}, (names[id(m)] for m in linears))
        for module in linears:
            pattern = patterns.get(names[id(module)], "")
            outputs, inputs = module.weight.shape[:: -1 if is_transposed(module) else 1]
            style = "colwise_gather_output" if outputs >= inputs else "rowwise_split_input"
            if pattern and pattern not in styles and max(outputs, inputs) % tp == 0:
                small, inside = called[pattern]
                styles[pattern] = "replicate" if small.weight_is_read(inside) else style
    return {name: style for name, style in styles.items() if style != "replicate"}
