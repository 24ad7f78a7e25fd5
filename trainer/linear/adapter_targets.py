"""What gets an adapter: each entry of `tuning.target_modules` must match, and an empty list means the same everywhere.

    linear layer      a torch.nn.Linear (GPT-2: Conv1D) of a decoder layer: q_proj, down_proj, ...
    stacked experts   one parameter [experts, ..., ...] that no linear layer holds: experts.gate_up_proj, ...

Empty: every linear layer of the decoder layers, except routers and gates. Stacked experts get adapters where they are
named; the adapter of such a parameter has `tuning.rank` rows for each expert. peft's own "all-linear" means other
things for some families, whose targets it rewrites to names of transformers 4, so it gets the names that are found
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError
from trainer.model.build import decoder_layers
from trainer.model.layers import is_linear

ROUTERS = ("router", "gate")
ALREADY_ADAPTED = "base_layer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Names in the model. linears: of modules; stacks: of parameters."""

    linears: tuple[str, ...]
    stacks: tuple[str, ...]


def find_targets(
    model: PreTrainedModel, entries: Sequence[str], *, without: Iterable[str] = (), strict: bool = True
) -> Targets:
    """What `tuning.target_modules` names, in the model without adapters.

    without: parameters that get no gradient: an adapter of theirs would get none either. strict: false for a model with
    fewer layers, where an entry may name a layer that is not there.

    Raises ConfigError with a line for each entry that matches nothing.
    """
    untrained = {name.rpartition(".")[0] for name in without}
    linears = [name for name in _linears(model) if name not in untrained]
    stacks = [name for name in _stacks(model) if name not in without]
    unmatched = _unmatched(entries, linears, stacks) if strict else ()
    if problems := [_nothing(model, entries, entry, linears, stacks) for entry in unmatched]:
        raise ConfigError(*problems)
    if entries:
        chosen = [name for name in linears if _named(name, entries)]
        chosen_stacks = [name for name in stacks if _named(name, entries)]
    else:
        chosen, chosen_stacks = [name for name in linears if not _is_router(model, name)], []
    if not chosen and not chosen_stacks:
        raise ConfigError(
            f"tuning.target_modules={list(entries)}: the decoder layers of {type(model).__name__} have no linear layer;"
            f" name what else is to get adapters{_there_is([], stacks)}"
        )
    return Targets(linears=tuple(chosen), stacks=tuple(chosen_stacks))


def kinds(names: Iterable[str]) -> list[str]:
    """Names without the part before a layer's number and the word weight, each once: self_attn.q_proj."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight") for name in names))


def _unmatched(entries: Sequence[str], linears: Sequence[str], stacks: Sequence[str]) -> Iterator[str]:
    names = (*linears, *stacks)
    yield from (entry for entry in entries if not any(_named(name, (entry,)) for name in names))


def _nothing(
    model: PreTrainedModel, entries: Sequence[str], entry: str, linears: Sequence[str], stacks: Sequence[str]
) -> str:
    elsewhere = any(name == entry or name.endswith(f".{entry}") for name, _ in model.named_modules())
    why = "is no linear layer of the decoder of" if elsewhere else "matches nothing of"
    return f"tuning.target_modules={list(entries)}: {entry} {why} {type(model).__name__}{_there_is(linears, stacks)}"


def _there_is(linears: Sequence[str], stacks: Sequence[str]) -> str:
    parts = [f"linear layers {', '.join(kinds(linears))}"] if linears else []
    parts += [f"stacked experts {', '.join(kinds(stacks))}"] if stacks else []
    return f"; it has {' and '.join(parts)}" if parts else ""


def _named(name: str, entries: Iterable[str]) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _in_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the decoder layers, by their names in the model."""
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    for name, module in stack.named_modules(prefix=prefix):
        if ALREADY_ADAPTED not in name:
            yield name, module


def _linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in _in_layers(model) if is_linear(module)]


def _stacks(model: PreTrainedModel) -> list[str]:
    """Parameters of three dimensions: a convolution has them too, and computes with them in its own way."""
    return [
        f"{name}.{leaf}"
        for name, module in _in_layers(model)
        if not type(module).__module__.startswith("torch.nn")
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and len(set(parameter.shape)) > 1 and 1 not in parameter.shape
    ]


def _is_router(model: PreTrainedModel, name: str) -> bool:
    """A linear layer with a feature for each expert, or one for the shared expert: it decides who computes."""
    text = model.config.get_text_config()
    counts = {1} | {getattr(text, field, None) for field in ("num_experts", "num_local_experts", "n_routed_experts")}
    module = model.get_submodule(name)
    is_one = any(part in ROUTERS or part.endswith("_gate") for part in name.split("."))
    return is_one and isinstance(module, nn.Linear) and module.out_features in counts
