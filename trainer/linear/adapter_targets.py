"""Targets of adapters: each entry of `tuning.target_modules` must match, and an empty list has one meaning everywhere.

    linear layer      a torch.nn.Linear (GPT-2: Conv1D) of a decoder layer: q_proj, down_proj, ...
    stacked experts   one parameter [experts, ..., ...] that no linear layer holds: experts.gate_up_proj, ...

Empty: every linear layer of the decoder layers, except routers and gates. A layer whose class computes something else,
or whose weight the model's code reads without calling the layer, does not count. Stacked experts get adapters if they
are named; the adapter of such a parameter has `tuning.rank` rows per expert. ALL means the same as an empty list.
peft's own "all-linear" has other meanings for some families, whose targets it rewrites to names of transformers 4, so
peft gets the names that are found here. An entry with a character that no name has is a regular expression for full
names. `tuning.layers` restricts the layers to these numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError
from configs.schema import Tuning
from trainer.model.build import decoder_layers
from trainer.model.layers import computes_linearly, is_packed
from trainer.model.roles import INNER
from trainer.plan.model_fields import EXPERTS

ROUTERS = ("router", "gate")
ALL = "all-linear"
PATTERN = re.compile(r"[*+?()\[\]|\\^$]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Names in the model. linears: of modules; stacks: of parameters."""

    linears: tuple[str, ...]
    stacks: tuple[str, ...]


def find_targets(
    model: PreTrainedModel, tuning: Tuning, *, without: Iterable[str] = (), strict: bool = True
) -> Targets:
    """The targets of `tuning.target_modules` and `tuning.layers`, in the model without adapters.

    without: parameters that get no gradient; an adapter of theirs would get none either. strict: false for a model with
    fewer layers, which then has adapters in all of them, and where an entry may name a missing layer.

    Raises ConfigError with a line for each entry that matches nothing.
    """
    untrained = {name.rpartition(".")[0] for name in without}
    linears = [name for name in _linears(model) if name not in untrained]
    stacks = [name for name in _stacks(model) if name not in without]
    entries = [entry for entry in tuning.target_modules if entry != ALL]
    unmatched = _unmatched(entries, linears, stacks) if strict else ()
    problems = [_nothing(model, tuning.target_modules, entry, linears, stacks) for entry in unmatched]
    problems += _not_layers(model, tuning.layers) if strict else ()
    if problems:
        raise ConfigError(*problems)
    if tuning.layers and strict:
        linears, stacks = (_inside(model, names, tuning.layers) for names in (linears, stacks))
    everything = [name for name in linears if not is_router(model, name)]
    if entries:
        also = everything if len(entries) < len(tuning.target_modules) else []
        chosen = [name for name in linears if _named(name, entries) or name in also]
        chosen_stacks = [name for name in stacks if _named(name, entries)]
    else:
        chosen, chosen_stacks = everything, []
    if not chosen and not chosen_stacks:
        raise ConfigError(_none_chosen(model, tuning, stacks))
    return Targets(linears=tuple(chosen), stacks=tuple(chosen_stacks))


def find_whole(model: PreTrainedModel, tuning: Tuning, targets: Targets, *, strict: bool = True) -> list[str]:
    """Names of the parameters that `tuning.modules_to_save` asks to train, in the model without adapters.

    Raises ConfigError with a line for each entry that matches no module with parameters, or one that cannot be trained
    together with adapters.
    """
    problems, found = [], []
    adapted = {*targets.linears, *(name.rpartition(".")[0] for name in targets.stacks)}
    owners: dict[int, list[str]] = {}
    for full, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(full)
    for entry in tuning.modules_to_save:
        modules = [name for name, _ in model.named_modules() if name and _named(name, (entry,))]
        names = [f"{name}.{leaf}" for name in modules for leaf, _ in model.get_submodule(name).named_parameters()]
        key = f"tuning.modules_to_save={list(tuning.modules_to_save)}: {entry}"
        if not names and strict:
            problems.append(f"{key} matches no module of {type(model).__name__} that has parameters")
        elif shared := next((name for name in names if len(owners[id(model.get_parameter(name))]) > 1), None):
            both = " and ".join(owners[id(model.get_parameter(shared))])
            problems.append(f"{key} is tied ({both} are one parameter), and peft would part them; leave it out")
        elif clash := next((m for m in adapted if any(name.startswith(f"{m}.") for name in names)), None):
            problems.append(f"{key} is to be trained whole, and {clash} is to get an adapter; take out either")
        elif any(is_packed(*_owner(model, name)) for name in names):
            problems.append(f"{key} is kept in 4 bits, which cannot be trained; take it out, or use tuning=lora")
        found += names
    if problems:
        raise ConfigError(*problems)
    return list(dict.fromkeys(found))


def _owner(model: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module), leaf


def _none_chosen(model: PreTrainedModel, tuning: Tuning, stacks: Sequence[str]) -> str:
    if tuning.layers and tuning.target_modules:
        return f"tuning.layers={tuning.layers}: these layers have nothing that tuning.target_modules names; add others"
    return (
        f"tuning.target_modules={list(tuning.target_modules)}: the decoder layers of {type(model).__name__} have no"
        f" linear layer; name what else is to get adapters{_there_is([], stacks)}"
    )


def _not_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[str]:
    count = len(decoder_layers(model))
    if wrong := [layer for layer in layers if layer >= count]:
        yield f"tuning.layers={list(layers)}: {wrong[0]} is no layer of the model, which has 0 to {count - 1}"


def _inside(model: PreTrainedModel, names: Iterable[str], layers: Sequence[int]) -> list[str]:
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    return [name for name in names if int(name.removeprefix(f"{prefix}.").partition(".")[0]) in layers]


def kinds(names: Iterable[str]) -> list[str]:
    """Names without the part before a layer's number and without "weight", each once: self_attn.q_proj."""
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
    return any(
        re.fullmatch(entry, name) if PATTERN.search(entry) else name == entry or name.endswith(f".{entry}")
        for entry in entries
    )


def _in_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the decoder layers, by their names in the model."""
    stack = decoder_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is stack)
    for name, module in stack.named_modules(prefix=prefix):
        if INNER not in name.split("."):  # it has an adapter already
            yield name, module


def _linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in _in_layers(model) if computes_linearly(module)]


def _stacks(model: PreTrainedModel) -> list[str]:
    """Parameters with three dimensions. A convolution has them too, but computes differently with them."""
    return [
        f"{name}.{leaf}"
        for name, module in _in_layers(model)
        if not type(module).__module__.startswith("torch.nn")
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and len(set(parameter.shape)) > 1 and 1 not in parameter.shape
    ]


def is_router(model: PreTrainedModel, name: str) -> bool:
    """A linear layer with one output per expert, or with one for the shared expert: it chooses the experts."""
    text = model.config.get_text_config()
    counts = {1} | {getattr(text, field, None) for field in EXPERTS}
    module = model.get_submodule(name)
    is_one = any(part in ROUTERS or part.endswith("_gate") for part in name.split("."))
    return is_one and isinstance(module, nn.Linear) and module.out_features in counts
