"""Start-up probe of an architecture: a narrow copy of its language model, equally deep, runs once on the CPU.

    a later token is changed    do earlier logits change?         then it is no causal model as it is called: refused
    one backward                which parameters get no gradient?  they are frozen, in every layout alike
                                which linear layers are not called, though their weights get one?
                                                                  they keep their class: an adapter would add nothing

DDP waits for the gradient of every trained parameter, and checkpoints need an optimizer state of each: both would fail
only at step 2 or at the first save. The probe takes a fraction of a second, and gives the same answer on every rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from configs.errors import first_line
from trainer.model.layers import is_linear
from trainer.model.miniature import language_model, shrink, stand_ins

log = logging.getLogger(__name__)
SEED = 1234
TOKENS, MANY = 16, 512
"""Many tokens if few leave a parameter without gradient: compressors of token blocks get it only from whole blocks."""
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
DEEP, SHALLOW = 20_000_000, 100_000_000  # maximum parameters of a copy with all layers, with a few
TOLERANCE = 1e-3
"""Relative to the largest logit, in float32: rounding gives 1e-6, a look ahead 1e-1 and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """causal: whether logits depend only on earlier tokens.
    trained, untrained: the copy's parameters with and without gradient, by their names inside the decoder or else in
    the model.
    layers: for each layer of the model the corresponding one of the copy; empty if the copy has all.
    uncalled: weights of linear layers that get a gradient without a call of the layer.
    reversible: layers that recompute themselves in their own backward (Reformer's), which no wrapper of the layer
    sees."""

    causal: bool
    trained: frozenset[str]
    untrained: frozenset[str]
    layers: tuple[int, ...] = ()
    uncalled: frozenset[str] = frozenset()
    reversible: bool = False


_found: dict[str, Probe | None] = {}


def probe(config: PretrainedConfig, tokens: int = TOKENS) -> Probe | None:
    """None, with a line in the log, for an architecture whose narrow copy does not run. config: of a language model.
    tokens: per sequence of the run. A process that asks twice, for the estimate and for the engine, computes once."""
    # Changes that building the model makes to its config do not make another architecture.
    fields = {
        name: value for name, value in config.to_dict().items() if name not in ("architectures", "use_cache", "dtype")
    }
    key = repr((sorted(fields.items()), tokens))
    if key not in _found:
        _found.clear()
        _found[key] = _probe(config, tokens)
    return _found[key]


def _probe(config: PretrainedConfig, tokens: int) -> Probe | None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        try:
            model, layers = _narrow_copy(config)
            ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, TOKENS))
            called = _notes_calls(model)
            causal = _is_causal(model, ids)
            try:
                untrained, reversible = _without_gradient(model, ids[:, :tokens]), False
            except Exception:  # reversible layers have no backward outside training
                untrained, reversible = _without_gradient(model.train(), ids[:, :tokens]), True
            if untrained and tokens > TOKENS:
                untrained = _without_gradient(model, ids.repeat(1, -(-min(tokens, MANY) // TOKENS))[:, :tokens])
        except Exception as error:  # a miniature config may break any rule of its architecture
            reason = first_line(error)
            log.info("not probed: a small %s does not run: %s", config.model_type, reason)
            return None
    weights = {id(module.weight) for module in model.modules() if is_linear(module)} - called
    return Probe(
        causal=causal,
        trained=frozenset(name for name, _ in _inside(model)) - untrained,
        untrained=untrained,
        layers=tuple(layers),
        uncalled=frozenset(name for name, p in _inside(model) if id(p) in weights) - untrained,
        reversible=reversible,
    )


def _notes_calls(model: PreTrainedModel) -> set[int]:
    """Ids (`id`) of the weights of linear layers that are called from now on."""
    called: set[int] = set()

    def note(layer: nn.Module, _: object) -> None:
        called.add(id(layer.weight))

    for module in model.modules():
        if is_linear(module):
            module.register_forward_pre_hook(note)
    return called


def _without_gradient(model: PreTrainedModel, ids: torch.Tensor) -> frozenset[str]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    return frozenset(name for name, parameter in _inside(model) if parameter.grad is None)


def untrained_names(model: PreTrainedModel, found: Probe) -> list[str]:
    """Names of the model's parameters that get no gradient. In a multimodal model the other parts get none either: the
    input here is text alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_text = model.config.get_text_config() is model.config
    alike = {_pattern(name) for name in found.untrained} - {_pattern(name) for name in found.trained}
    untrained = []
    for name, parameter in _inside(model):
        stand_in = _stand_in(name, found.layers)
        if stand_in not in found.trained and (
            stand_in in found.untrained or _pattern(name) in alike or not (of_text or _known(name, found))
        ):
            untrained.append(names[id(parameter)])
    return untrained


def uncalled_names(model: PreTrainedModel, found: Probe) -> list[str]:
    """Names of the model's weights that get a gradient without a call of the linear layer that owns them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = ((name, names[id(parameter)]) for name, parameter in _inside(model))
    return [name for there, name in inside if _stand_in(there, found.layers) in found.uncalled]


def _stand_in(name: str, layers: Sequence[int]) -> str:
    """The name of the copy's parameter that corresponds to this one."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if place is not None and int(parts[place]) < len(layers):
        parts[place] = str(layers[int(parts[place])])
    return ".".join(parts)


def _known(name: str, found: Probe) -> bool:
    """Whether the copy has such a parameter, possibly in fewer layers."""
    return _pattern(name) in {_pattern(other) for other in found.trained | found.untrained}


def _inside(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters under names that a composite model's decoder shares with the same decoder alone."""
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), None)
    for name, parameter in model.named_parameters():
        inside = prefix is not None and name.startswith(prefix)
        yield f"decoder.{name.removeprefix(prefix)}" if prefix and inside else name, parameter


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _narrow_copy(config: PretrainedConfig) -> tuple[PreTrainedModel, list[int]]:
    """A copy as deep as the model, or with few layers if a deep copy is too large, and the copy's layer for each layer
    of the model. Raises ValueError if both are too large."""
    # A recurrence runs token by token if its kernel is not installed: every further layer would take a second.
    kinds = set(getattr(config, "layer_types", None) or ())
    small, size, layers = config, 0, list[int]()
    for whole_depth in (True, False) if kinds <= ATTENTION else (False,):
        small = shrink(config, 1, whole_depth=whole_depth)
        layers = [] if whole_depth else stand_ins(config)
        with torch.device("meta"):
            size = sum(p.numel() for p in language_model(small).parameters())
        if size <= (DEEP if whole_depth else SHALLOW):
            break
    else:
        raise ValueError(f"{size:,} parameters are left of it")
    model = language_model(small, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Only floating-point tensors can have a gradient.
            if parameter.is_floating_point():
                parameter.requires_grad_().add_(torch.randn_like(parameter), alpha=0.1)
    return model, layers


@torch.no_grad()
def _is_causal(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    changed, half = ids.clone(), TOKENS // 2
    changed[:, half:] = ids[:, half:].flip(0)
    first, second = (model(input_ids=tokens, use_cache=False).logits[:, :half] for tokens in (ids, changed))
    return bool((first - second).abs().max() <= TOLERANCE * first.abs().max())
