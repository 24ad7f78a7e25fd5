"""How a Hugging Face decoder calls its parts: observed in one run without memory, not listed by architecture.

    tokens --> embedding, positions, ... --> layer 0 --> layer 1 --> ... --> norm --> head --> logits
               |------- before -----|       |---------- layers --------|      |--- after ---|

The model runs once on fake tensors, which have shapes and no values, with layers that return their input. The run shows
which parts are called before the layers and which after, a layer's return value (hidden states, or a tuple that begins
with them) and the width of hidden states. It also proves that the chain can be split anywhere: each layer gets exactly
the previous layer's result, and no other input that needs a gradient, unless it is computed from the tokens alone
(embeddings for each layer, learned positions); every stage computes such inputs. Next: `split`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from configs.errors import ConfigError
from trainer.model.build import decoder_layers
from trainer.model.layers import owned, values_shape
from trainer.model.roles import met, routed_parts

# A layer's return value: the hidden states, or a tuple that starts with them.
RETURNS: tuple[Callable[[Any], Any], ...] = (
    lambda hidden: hidden,
    lambda hidden: (hidden,),
    lambda hidden: (hidden, None),
    lambda hidden: (hidden, None, None),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """before, after: names of the modules that own parameters outside the layers, by the time of their call; modules
    that are never called count as before.
    returns: makes a layer's return value from hidden states.
    hidden: shape of hidden states after [batch, seq].
    embedded: shape of the tensors that replace embeddings.
    repeated: whether layers get further inputs, which every stage must compute from the tokens.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    returns: Callable[[Any], Any]
    hidden: tuple[int, ...]
    embedded: tuple[int, ...]
    repeated: bool = False

    @property
    def hidden_size(self) -> int:
        """Number of features per token between two layers."""
        return prod(self.hidden)


def examine(model: PreTrainedModel) -> Examined:
    """Run the model once without memory and observe the order of its calls. Raises ConfigError if its layers are not a
    chain that can be split."""
    furthest, problem = -1, ""
    for returns in RETURNS:
        probe = _Probe(model, returns)
        try:
            return probe.run()
        except _NotAChain as found:
            reason = str(found)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            # The model cannot unpack the layers' result: they return something else.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if probe.layer_calls > furthest:
            furthest, problem = probe.layer_calls, reason
    raise ConfigError(
        f"model: {type(model).__name__} cannot be cut into pipeline stages ({problem}); use parallel.pp=1"
    )


def count_costs(model: PreTrainedModel, anatomy: Examined) -> tuple[list[float], float]:
    """Cost of each layer and of the parts after the layers, in units of the average layer.

    Counted are multiply-adds per token: the entries of all matrices; of experts only those that a token uses. The
    attention itself grows with the sequence and is left out, because it is the same in every layer.
    """
    routed = routed_parts(model)

    def products(module: nn.Module) -> float:
        total = 0.0
        for _, owner, leaf, parameter in owned(module):
            shape = values_shape(owner, leaf, parameter)
            total += met(shape.numel(), routed.get(id(parameter))) if len(shape) >= 2 else 0
        return total

    layers = [products(layer) for layer in decoder_layers(model)]
    unit = sum(layers) / len(layers)
    return [cost / unit for cost in layers], sum(products(model.get_submodule(name)) for name in anatomy.after) / unit


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A model's first argument to a layer, by position or by name: the hidden states."""
    return args[0] if args else next(iter(kwargs.values()), None)


class _NotAChain(Exception):
    """The layers are called in a way that does not allow a split."""


class _Probe:
    """One forward in which layers return their input and the calls of all other parameter owners are recorded."""

    def __init__(self, model: PreTrainedModel, returns: Callable[[Any], Any]) -> None:
        self.model = model
        self.returns = returns
        self.layers = list(decoder_layers(model))
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        self.others = {
            name: module for name, module in model.named_modules() if module._parameters and id(module) not in inside
        }
        self.layer_calls = 0
        self.called_after: dict[str, int] = {}  # name: number of layers called before it
        self.hidden: torch.Tensor | None = None
        self.embedded: tuple[int, ...] = ()
        self.passed: set[Any] = set()  # nodes of the autograd graph at which layers were
        self.repeated = False

    def run(self) -> Examined:
        for name, module in self.others.items():
            if any(part is self.layers[0] for part in module.modules()):
                raise _NotAChain(f"{name or 'the model'} owns parameters outside its layers")
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: self._note(name))
            for name, module in self.others.items()
        ]
        handles.append(self.model.get_input_embeddings().register_forward_hook(self._embed))
        for number, layer in enumerate(self.layers):
            layer.forward = lambda *args, number=number, **kwargs: self._pass_on(number, args, kwargs)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                state = {
                    name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.is_floating_point())
                    for name, p in self.model.named_parameters()
                }
                buffers = {name: mode.from_tensor(buffer) for name, buffer in self.model.named_buffers()}
                inputs = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "use_cache": False}
                functional_call(self.model, {**state, **buffers}, (), inputs)
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers:
                del layer.forward
        return self._anatomy()

    def _note(self, name: str) -> None:
        self.called_after.setdefault(name, self.layer_calls)
        if 0 < self.layer_calls < len(self.layers):
            raise _NotAChain(f"{name} is called between layers")

    def _embed(self, _: nn.Module, __: Any, output: Any) -> None:
        self.embedded = self.embedded or tuple(output.shape[2:])

    def _pass_on(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = first_argument(args, kwargs)
        if number != self.layer_calls:
            raise _NotAChain(f"layer {number} is called where layer {self.layer_calls} was expected")
        if not isinstance(hidden, torch.Tensor) or (number > 0 and hidden is not self.hidden):
            raise _NotAChain(f"layer {number} does not get what the layer before returned")
        for other in tree_leaves((args, kwargs)):
            if isinstance(other, torch.Tensor) and other is not hidden and other.requires_grad:
                self.repeated = True
                if self._comes_from_layers(other):
                    raise _NotAChain(
                        f"layer {number} gets more than the hidden states, and a gradient would have to flow there"
                    )
        self.layer_calls += 1
        self.hidden = hidden.clone()
        self.passed.add(self.hidden.grad_fn)
        return self.returns(self.hidden)

    def _comes_from_layers(self, tensor: torch.Tensor) -> bool:
        waiting, met = [tensor.grad_fn], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in self.passed:
                return True
            if node is not None and node not in met:
                met.add(node)
                waiting += [before for before, _ in node.next_functions]
        return False

    def _anatomy(self) -> Examined:
        if self.layer_calls != len(self.layers):
            raise _NotAChain(f"of {len(self.layers)} layers {self.layer_calls} are called")
        assert self.hidden is not None
        after = tuple(name for name, calls in self.called_after.items() if calls == len(self.layers))
        return Examined(
            before=tuple(name for name in self.others if name not in after),
            after=after,
            returns=self.returns,
            hidden=tuple(self.hidden.shape[2:]),
            embedded=self.embedded or tuple(self.hidden.shape[2:]),
            repeated=self.repeated,
        )
