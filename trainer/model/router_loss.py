"""The balancing loss of a mixture of experts, as transformers defines it (Fedus et al. 2022, arXiv:2101.03961, 4 to 6).

    step's loss = cross-entropy per valid token  +  router_aux_loss_coef * mean over its micro-batches of aux_loss

`model.config.output_router_logits=true` asks for it. The model's own forward computes `aux_loss` of one micro-batch,
over all its layers and positions. It is no sum over tokens but a product of two means, so its value depends on what
one micro-batch is. The mean is taken over the micro-batches of all data-parallel ranks, and each counts the same:
layouts that cut a step into the same micro-batches have the same loss. Validation measures the language model alone.

The rule `check_router` needs no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from configs.choices import EngineName
from configs.errors import ConfigError, PlanError
from configs.schema import Config
from trainer.plan.model_fields import config_fields, text_fields

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FLAG = "model.config.output_router_logits"
COEFFICIENT = "model.config.router_aux_loss_coef"
NAMES = ("router_aux_loss_coef", "aux_loss_coef")


def check_router(config: Config, cutting: Mapping[str, int]) -> Iterator[str]:
    """Problems of a config that asks for the balancing loss, or gives its coefficient without asking.

    cutting: degrees of the axes that cut the model or its sequences.
    """
    fields = config_fields(config)
    wanted = bool(fields.get("output_router_logits"))
    given = text_fields(config.model.config)
    for name in NAMES if not wanted else ():
        # A folder may leave the flag out and be right: this is about what the user has typed.
        if name in given:
            yield f"model.config.{name}={given[name]}: is read with {FLAG}=true only; set that too, or leave it out"
    if wanted:
        yield from _refuse(config, cutting)


def _refuse(config: Config, cutting: Mapping[str, int]) -> Iterator[str]:
    reason = f"the balancing loss that {FLAG}=true adds (with {COEFFICIENT})"
    remedy = f"use parallel=single, ddp or fsdp, or set {FLAG}=false"
    if config.parallel.engine is EngineName.deepspeed:
        yield f"parallel.engine=deepspeed: leaves out {reason}; {remedy}"
    for axis, degree in cutting.items():
        yield f"parallel.{axis}={degree}: leaves out {reason}; {remedy}"
    if config.train.compile:
        yield f"train.compile=true: loses the router's logits, of which {reason} is made; set either to false"


class RouterLoss:
    """What a step adds to its loss. coefficient: the model's own."""

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient

    def of(self, output: Any) -> torch.Tensor:
        """Of one micro-batch. output: of the model's forward. Raises ConfigError where no layer has a router."""
        if output.aux_loss is None or isinstance(output.aux_loss, int):
            raise ConfigError(f"{FLAG}=true: this model has no layer with a router; set it to false")
        return self.coefficient * output.aux_loss


def build_router_loss(model: PreTrainedModel, config: Config, cutting: Mapping[str, int]) -> RouterLoss | None:
    """None where the model's config does not ask for it. cutting: as `check_router`.

    Raises PlanError where this layout would leave it out (the config of a hub id is seen only here), ConfigError for a
    model whose code computes none.
    """
    coefficient = router_coefficient(model)
    if coefficient is None:
        return None
    if problems := list(_refuse(config, cutting)):
        raise PlanError(*problems)
    return RouterLoss(coefficient)


def router_coefficient(model: PreTrainedModel) -> float | None:
    """By what the model multiplies its `aux_loss` where it is called with labels; None where it is not asked to."""
    text = model.config.get_text_config()
    if not (getattr(model.config, "output_router_logits", False) or getattr(text, "output_router_logits", False)):
        return None
    found = [getattr(owner, name, None) for owner in (model, text) for name in NAMES]
    coefficient = next((value for value in found if value is not None), None)
    if coefficient is None or not _computes_one(model):
        raise ConfigError(
            f"{FLAG}=true: transformers' code of {type(model).__name__} computes no balancing loss; set it to false"
        )
    return float(coefficient)


def _computes_one(model: PreTrainedModel) -> bool:
    """Whether the model's forward mentions it. Some return a class that has room for it and never fill it."""
    forward = inspect.unwrap(type(model).forward)
    return "aux_loss" in inspect.getsource(forward)
