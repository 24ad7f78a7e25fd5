"""A test-only kind of linear layer: it computes with twice its weight, and its weight is a tensor subclass.

Its losses show code that skips such a layer, or that replaces its parameter by a plain tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from configs.load import load_config
from configs.schema import Config, Tuning
from trainer import linear
from trainer.axes.gradients import local
from trainer.data.build import build_data
from trainer.engine import build_engine
from trainer.make_plan import make_plan
from trainer.model.build import build_hf_config, decoder_layers, text_config
from trainer.model.layers import is_linear, is_transposed
from trainer.plan.machine import find_machine
from trainer.process.runtime import join_world
from trainer.run.step import train_step

aten: Any = torch.ops.aten
KEPT = {aten.clone.default, aten.copy_.default, aten.detach.default, aten.new_zeros.default}
KEPT |= {
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.view.default,
    aten._to_copy.default,
    aten.as_strided.default,
    aten.alias.default,
}
CALLED: set[str] = set()


class Typed(torch.Tensor):
    """Wraps a plain tensor. Ops that move or slice values return this type again, as for torchao's float8 weights."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Typed:
        like = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **like)  # type: ignore[attr-defined]
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Typed, lambda tensor: tensor.held, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, Typed, result) if func in KEPT else result

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[torch.Tensor], None]:
        return (self.held,), None

    def fsdp_post_all_gather(
        self, outputs: tuple[torch.Tensor], metadata: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor]] | None:
        return (Typed(outputs[0]), outputs) if out is None else None


class Doubled(nn.Linear):
    place: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        CALLED.add(f"{self.place} {type(self.weight).__name__}")
        return F.linear(input, 2 * self.weight, self.bias)


class DoubledConv1D(Conv1D):
    place: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLED.add(f"{self.place} {type(self.weight).__name__}")
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), 2 * self.weight).view(*x.shape[:-1], self.nf)


class Doubling:
    """Implements `trainer.linear.Kind`."""

    __name__ = "doubling"
    KEEPS_MODEL = True

    @staticmethod
    def chosen(config: Config) -> bool:
        return True

    @staticmethod
    def problems(config: Config) -> Iterator[str]:
        yield from ()

    @staticmethod
    def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
        Doubling.imitate(model, config)

    @staticmethod
    def imitate(model: PreTrainedModel, config: Config) -> None:
        for place, module in decoder_layers(model).named_modules():
            if is_linear(module):
                kind: Any = DoubledConv1D if is_transposed(module) else Doubled
                module.__class__, vars(module)["place"] = kind, place
                module._parameters["weight"] = nn.Parameter(Typed(module.weight.detach()))

    @staticmethod
    def owns(name: str) -> bool:
        return False

    @staticmethod
    def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
        pass

    @staticmethod
    def report(model: PreTrainedModel) -> None:
        pass

    @staticmethod
    def identity(config: Config) -> dict[str, Any]:
        return {}

    @staticmethod
    def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
        pass

    @staticmethod
    def matmuls() -> set[object]:
        return set()

    @staticmethod
    def settle(modules: Iterable[nn.Module]) -> None:
        pass

    @staticmethod
    def description(config: Config) -> str:
        return ""

    @staticmethod
    def traced(config: Config) -> Any:
        return None


def train_doubled(overrides: list[str], doubled: bool) -> tuple[list[float], list[str], set[str]]:
    """Train a run. Returns its losses, the layers called with the types of their weights, and the types at rest.

    doubled: whether to add the kind `Doubling`.
    """
    config = load_config(overrides)
    plan = make_plan(config, find_machine())
    kinds = (*linear.KINDS, Doubling) if doubled else linear.KINDS
    with patch.object(linear, "KINDS", kinds), join_world(plan, timeout_minutes=1) as runtime:
        vocabulary = text_config(build_hf_config(config.model)).vocab_size
        data = build_data(config, plan, data_rank=plan.data_rank(runtime.rank), vocab_size=vocabulary)
        engine = build_engine(config, plan, runtime)
        CALLED.clear()
        steps = data.steps()
        losses = [train_step(engine, next(steps), plan, runtime, 1e-3).loss for _ in range(config.train.steps)]
        layers = [module for module in decoder_layers(engine.model).modules() if is_linear(module)]
        at_rest = {type(local(layer.weight).detach()).__name__ for layer in layers}
        engine.close()
    return losses, sorted(CALLED), at_rest
