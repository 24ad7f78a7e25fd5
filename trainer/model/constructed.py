"""The values that a model's constructors give to parameters that its initialisation does not set.

    built without memory     a parameter has a shape and no value: whatever a constructor wrote is lost
    filled with NaN          then `_init_weights` of the model, which sets most of them
    NaN still                the constructor's value: Apertus' activation slopes, all projections of OpenAI's GPT

The module that owns such a parameter is constructed again, with the arguments that its model gave it; its own
parameters are then real, those of its children are not. Random values of a constructor come from a generator seeded
with the run's seed and the module's name, so they are the same in every layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from configs.errors import ConfigError

Call = tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]


class Constructors:
    """Knows how each module of a model was constructed. Builds the model without memory once, on first use."""

    def __init__(self, model: PreTrainedModel) -> None:
        # A sharding engine later replaces the model's class by its own.
        self.kind, self.config = type(model), model.config
        self.plain: PreTrainedModel | None = None
        self.calls: dict[str, Call] = {}

    def fill(self, name: str, leaf: str, parameter: torch.Tensor, seed: Callable[[str], int]) -> None:
        """Replace the NaN of a parameter `leaf` of the module `name` by the constructor's values.

        Raises ConfigError if the constructor leaves NaN too.
        """
        with _deterministic():
            torch.manual_seed(seed(f"{name} as constructed"))
            value = self._construct(name)._parameters[leaf]
        assert value is not None
        parameter.copy_(torch.where(parameter.isnan(), value.to(parameter.device, parameter.dtype), parameter))
        if parameter.isnan().any():
            raise ConfigError(
                f"model.weights=random: {self.kind.__name__} gives {name}.{leaf} no value, neither when it is"
                " constructed nor by its initialisation; use model.weights=pretrained"
            )

    def _construct(self, name: str) -> nn.Module:
        if name not in self.calls:
            self._record(name)
        kind, args, kwargs = self.calls[name]
        module = kind.__new__(kind)
        register = nn.Module.register_parameter

        def own_alone(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and self is not module:
                param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            register(self, name, param)

        nn.Module.register_parameter = own_alone
        try:
            module.__init__(*args, **kwargs)
        finally:
            nn.Module.register_parameter = register
        return module

    def _record(self, name: str) -> None:
        """Build the model again and record the arguments of every module with the class of `name`."""
        if self.plain is None:
            self.plain = self._build()
        kind = type(self.plain.get_submodule(name))
        init, seen = kind.__init__, []

        def noted(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if type(self) is kind:
                seen.append((self, args, kwargs))
            init(self, *args, **kwargs)

        kind.__init__ = noted
        try:
            built = self._build()
        finally:
            kind.__init__ = init
        names = {id(module): path for path, module in built.named_modules()}
        self.calls.update((names[id(m)], (kind, args, kwargs)) for m, args, kwargs in seen if id(m) in names)

    def _build(self) -> PreTrainedModel:
        with init_empty_weights(include_buffers=False):
            return self.kind._from_config(copy.deepcopy(self.config), dtype=torch.float32)


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch fills unwritten memory with NaN, and its generator is restored afterwards."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
