"""A model's routers: their place, their outputs, and how logits become probabilities.

transformers marks the routers of every architecture: `_can_record_outputs["router_logits"]` gives their class and the
index of the logits in their output. The other two outputs are the weights and the indices of the chosen experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from trainer.plan.model_fields import EXPERTS

BIASES = ("e_score_correction_bias", "expert_bias")
"""Buffers, of a router or its block, that are added to the scores before experts are chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """name: of the module in its model. logits: index in its output. sigmoid: whether it scores each expert
    independently; else by a softmax over all. bias: the module that owns the buffer, and its name there."""

    name: str
    module: nn.Module
    logits: int
    sigmoid: bool
    bias: tuple[nn.Module, str] | None

    @property
    def experts(self) -> int:
        # Other outputs, if a router has them, include experts that return their input unchanged.
        return max(int(getattr(self.module, name, 0)) for name in (*EXPERTS, "num_router_classes"))

    @property
    def bias_name(self) -> str:
        """The buffer's name in the model; the router's own, or its block's."""
        assert self.bias is not None
        owner, leaf = self.bias
        return f"{self.name if owner is self.module else self.name.rpartition('.')[0]}.{leaf}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """A router's output for [tokens]. scores: index in the output. chosen: [tokens, k], indices of experts."""

    logits: torch.Tensor
    scores: int
    chosen: torch.Tensor


def find_routers(model: PreTrainedModel) -> list[Router]:
    """In layer order. The model may be a pipeline stage, whose other layers are elsewhere."""
    recorders = list(_recorders(model))
    found = []
    for name, module in model.named_modules():
        place = next((one.index for one in recorders if isinstance(module, one.target_class)), None)
        if place is not None:
            block = model.get_submodule(name.rpartition(".")[0])
            owned = [(owner, leaf) for owner in (module, block) for leaf in BIASES if leaf in owner._buffers]
            sigmoid = "sigmoid(" in inspect.getsource(type(module).forward)
            bias = next((one for one in owned if one[0]._buffers[one[1]] is not None), None)
            found.append(Router(name=name, module=module, logits=place, sigmoid=sigmoid, bias=bias))
    return [router for router in found if router.experts > 1]


def _recorders(model: PreTrainedModel) -> Iterator[OutputRecorder]:
    for part in model.modules():
        marked = (getattr(part, "_can_record_outputs", None) or {}) if isinstance(part, PreTrainedModel) else {}
        specs = marked.get("router_logits", ())
        for spec in specs if isinstance(specs, list | tuple) else [specs]:
            if isinstance(spec, OutputRecorder) and spec.target_class is not None:
                yield spec


def read(router: Router, output: Any) -> Routed:
    """The forward's output: a tuple with the logits, the scores and, for most, the chosen experts. JetMoe returns the
    tokens sorted by expert."""
    logits = output[router.logits]
    tensors = {place: value for place, value in enumerate(output) if isinstance(value, torch.Tensor)}
    numbers = [value for value in tensors.values() if not value.is_floating_point()]
    chosen = next((value for value in numbers if value.shape[:-1] == logits.shape[:-1]), None)
    scores = next(place for place, value in tensors.items() if place != router.logits and value.is_floating_point())
    if chosen is None:
        chosen = logits.detach().topk(int(router.module.top_k), dim=-1).indices  # pyright: ignore[reportArgumentType]
    return Routed(logits=logits, scores=scores, chosen=chosen)


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Sums over many tokens need more than 16 bit."""
    return logits if logits.dtype is torch.float64 else logits.float()


def probabilities(logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """[..., experts], with sum 1 for each token."""
    if not sigmoid:
        return torch.softmax(wide(logits), dim=-1)
    scores = torch.sigmoid(wide(logits))
    return scores / scores.sum(dim=-1, keepdim=True)


def to_logits(gradient: torch.Tensor, logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Converts the gradient by the probabilities into the gradient by the logits."""
    shares = probabilities(logits, sigmoid=sigmoid)
    centred = gradient - (gradient * shares).sum(dim=-1, keepdim=True)
    # p = softmax: dp_i = p_i (dx_i - sum p dx). p = s / sum s: ds_i / s_i = (1 - s_i) dx_i.
    return shares * centred * (1 - torch.sigmoid(wide(logits))) if sigmoid else shares * centred
