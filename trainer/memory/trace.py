"""Run the model's own code on fake tensors and note every storage: the source of all activation bytes.

    build_model -> keep three layers of each kind -> fake parameters -> the trainer's checkpointing
    -> forward, the trainer's loss, backward, under a StorageTracker -> sections of a `Trace`

Nothing is computed and nothing is allocated: a trace of Llama 405B takes seconds and no memory. No formula for any
family of models stands here; what Hugging Face's code and autograd keep is what is counted.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from configs.schema import Checkpointing
from trainer.loss import cross_entropy_sum
from trainer.memory.kernels import as_on_device, quiet
from trainer.memory.profile import Step, Trace
from trainer.memory.tracker import CAST, Born, Died, Mark, StorageTracker
from trainer.model import decoder_layers
from trainer.parallel.checkpointing import apply_checkpointing

LIKE_LAYERS = 3  # the first, one between two of its kind, the last

Groups = dict[str, tuple[str, str]]


class CannotTrace(Exception):
    """The model's code asks for the values of tensors, which fake tensors do not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a trace depends on besides the model.

    storage, compute: dtypes of the parameters and of autocast (None: no autocast). logits_dtype: what the root
    casts its output to (FSDP2's policy), None where the loss gets the logits as they are. gpu: follow the rules by
    which CUDA chooses its attention and dropout kernels, instead of the CPU's. exact_attention: without the flash
    kernel, calls that the memory-efficient one refuses fall back to a kernel that keeps all scores.
    """

    micro_batch_size: int
    seq_len: int
    storage: torch.dtype
    compute: torch.dtype | None
    logits_dtype: torch.dtype | None
    checkpointing: Checkpointing
    gpu: bool
    exact_attention: bool = False


def layer_kinds(model: nn.Module) -> list[int]:
    """A number for each decoder layer; layers with the same number have the same modules, shapes and settings."""
    kinds: dict[str, int] = {}
    types = getattr(getattr(model, "config", None), "layer_types", None)
    numbers = []
    for index, layer in enumerate(decoder_layers(model)):
        described = [types[index] if types else ""]
        for name, module in layer.named_modules():
            settings = {
                key: value
                for key, value in vars(module).items()
                if isinstance(value, bool | int | float | str) and "idx" not in key and "index" not in key
            }
            shapes = [(key, None if p is None else tuple(p.shape)) for key, p in module._parameters.items()]
            described.append(f"{name} {type(module).__name__} {sorted(settings.items())} {shapes}")
        numbers.append(kinds.setdefault("\n".join(map(str, described)), len(kinds)))
    return numbers


def shorten(model: PreTrainedModel) -> tuple[int, ...]:
    """Leave at most LIKE_LAYERS layers of each kind in the model, the last layer's kind last. Returns their kinds."""
    layers, kinds = decoder_layers(model), layer_kinds(model)
    order = [kind for kind in dict.fromkeys(kinds) if kind != kinds[-1]] + [kinds[-1]]
    chosen = [index for kind in order for index in _like(kinds, kind)]
    count = len(kinds)
    kept = [layers[index] for index in chosen]
    for index in reversed(range(count)):
        del layers[index]
    layers.extend(kept)
    # Lists with one entry per layer (layer_types) and the number of layers are read while the model runs.
    for key, value in list(vars(model.config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(model.config, key, [value[index] for index in chosen])
    model.config.num_hidden_layers = len(chosen)
    return tuple(kinds[index] for index in chosen)


def _like(kinds: list[int], kind: int) -> list[int]:
    found = [index for index, value in enumerate(kinds) if value == kind]
    return found if len(found) <= LIKE_LAYERS else [*found[: LIKE_LAYERS - 1], found[-1]]


def trace_model(model: PreTrainedModel, shape: Shape, groups: Groups) -> Trace:
    """Trace one micro-batch. model: on the meta device; it is shortened and filled with fake tensors.

    groups: each parameter's name -> (group, name in the group), layers left out. Raises CannotTrace.
    """
    kinds = shorten(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _make_fake(model, shape.storage)
        tokens = torch.zeros(shape.micro_batch_size, shape.seq_len, dtype=torch.long)
    model.train()
    apply_checkpointing(model, shape.checkpointing)
    tracker = StorageTracker()
    with (
        as_on_device(gpu=shape.gpu, exact_attention=shape.exact_attention),
        mode,
        tracker,
        warnings.catch_warnings(),
        quiet(),
    ):
        warnings.simplefilter("ignore")
        try:
            handles = _set_marks(model, tracker, groups)
            _micro_batch(model, tokens, shape, tracker)
        except Exception as error:  # the model's own code: anything may go wrong in it without values
            raise CannotTrace((str(error).strip().splitlines() or [type(error).__name__])[0]) from None
        for handle in handles:
            handle.remove()
        gradients = {name: tracker.number_of(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        del tokens
        gc.collect()
    return Trace(templates=kinds, sections=_sections(tracker, gradients, _grouped(model, groups), len(kinds)))


def _micro_batch(model: PreTrainedModel, tokens: torch.Tensor, shape: Shape, tracker: StorageTracker) -> None:
    """As the engines do it: forward under autocast or not, loss over the sum of valid tokens, backward."""
    with torch.autocast("cpu", shape.compute) if shape.compute else nullcontext():
        logits = model(input_ids=tokens, use_cache=False).logits
    tracker.mark("forward_exit root")
    if shape.logits_dtype is not None:
        logits = logits.to(shape.logits_dtype)
    tracker.mark("loss")
    loss = cross_entropy_sum(logits, tokens)
    del logits
    tracker.mark("backward")
    loss.backward()


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake parameters in place of meta ones; one that two modules share stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = made.get(id(parameter))
                if fake is None:
                    fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    made[id(parameter)] = fake
                module._parameters[name] = fake


def _set_marks(model: PreTrainedModel, tracker: StorageTracker, groups: Groups) -> list[Any]:
    """Hooks that note when forward and backward enter and leave each group, and when a gradient is complete."""
    named = {str(index): layer for index, layer in enumerate(decoder_layers(model))}
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    present = {group for group, _ in groups.values()}
    named |= {name: module for name, module in ends.items() if module is not None and name in present}
    handles = []
    for name, module in named.items():
        handles.append(module.register_forward_pre_hook(_entering(name, tracker), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaving(name, tracker)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_complete(name, tracker)))
    return handles


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


def _grouped(model: PreTrainedModel, groups: Groups) -> Groups:
    """(group, name in the group) of every parameter of the shortened model."""
    prefixes = {id(layer): str(index) for index, layer in enumerate(decoder_layers(model))}
    found = dict(groups)
    for name, module in model.named_modules():
        if id(module) in prefixes:
            found |= {f"{name}.{key}": (prefixes[id(module)], key) for key, _ in module.named_parameters()}
    return found


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
    return {key: tuple(steps) for key, steps in sections.items()}


def _after(name: str, subject: str, key: tuple[str, str], part: str, layers: int) -> tuple[tuple[str, str], str]:
    """Section and category from a mark on. A layer's section lasts until the next one begins."""
    match name, subject:
        case "backward", _:
            return ("b", "end"), "loss"
        case ("loss", _) | (_, "root"):
            return ("f", "end"), "loss"
        case "forward_enter", "head":
            return key, "loss"
        case "backward_exit", "head":
            return key, "workspace"
        case "forward_exit", _ if subject == str(layers - 1):
            return ("f", "end"), "activations"
        case ("backward_exit", "0") | ("backward_enter", "embedding"):
            return ("b", "begin"), "workspace"
        case "forward_enter" | "backward_enter", _ if subject.isdigit():
            return (name[0], subject), "activations" if name[0] == "f" else "workspace"
    return key, part
