"""Balancing a mixture of experts: kinds, each a module of this folder that answers for itself. Torch-free.

    none           nothing is added to the loss
    micro_batch    transformers' own term of each micro-batch       depends on how a step is cut
    sequence       DeepSeek-V3's term of each sequence              equal under every layout
    global_batch   the load of the whole step before this one       equal under every layout

A kind defines which experts' probabilities the loss raises or lowers, and by how much. `attach` adds that to the
backward at the router itself, so no output has to travel through a pipeline or a recompute. `balancing` counts, over
all ranks and micro-batches of a step; `bias` updates routers that balance themselves without a loss. A further kind is
one module, one entry of KINDS and the config value that chooses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from configs.choices import Balance
from configs.schema import Config
from trainer import linear
from trainer.moe import global_batch, micro_batch, sequence
from trainer.plan.model_fields import config_fields, text_fields

if TYPE_CHECKING:
    import torch

    from trainer.moe.seen import Seen, Step


class Kind(Protocol):
    """Interface of a kind. PER_LAYER: whether every layer has its own term, whose mean is logged."""

    @property
    def PER_LAYER(self) -> bool: ...

    @staticmethod
    def problems(config: Config) -> Iterator[str]:
        """Refusals of this kind, one line each. Asked of the kind that the config chooses."""
        ...

    @staticmethod
    def weights(seen: Seen, step: Step) -> Callable[[], torch.Tensor]:
        """Derivative of the step's term by the probability of each expert, the same for all tokens of a sequence:
        [sequences or 1, experts]. Called in the forward, once per layer and micro-batch. The returned function is
        called after that forward, and the term is the sum of probabilities times its result."""
        ...


KINDS: Mapping[Balance, Kind] = {
    Balance.micro_batch: micro_batch,
    Balance.sequence: sequence,
    Balance.global_batch: global_batch,
}
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha")
"""Fields of Hugging Face configs that hold the coefficient of a balancing loss."""
FLAG = "output_router_logits"


def acts(config: Config) -> bool:
    """Whether the routers are balanced, not only counted."""
    moe = config.moe
    return moe.balance is not Balance.none or moe.z_loss > 0 or moe.bias_update_rate > 0


def problems(config: Config) -> Iterator[str]:
    moe = config.moe
    if (kind := KINDS.get(moe.balance)) is not None:
        yield from kind.problems(config)
    else:
        yield from _check_unread(config)
    yield from check_flag(config_fields(config))
    if acts(config) and config.train.compile:
        yield f"train.compile=true: fuses the routers that {asked(config)} reaches into; set it to false"
    if moe.bias_update_rate and not linear.keeps_model(config):
        yield (
            f"moe.bias_update_rate={moe.bias_update_rate}: changes the model's own routers, which"
            f" {linear.setting(config)} leaves as they are; set it to 0"
        )


def check_flag(fields: Mapping[str, Any]) -> Iterator[str]:
    """fields: of the model's config. `moe.balance` decides whether a config's request for transformers' loss holds."""
    if fields.get(FLAG):
        yield (
            f"model.config.{FLAG}=true: moe.balance chooses the balancing loss here; set it to false, and"
            " moe.balance=micro_batch for the loss that transformers would add"
        )


def coefficient(config: Config, model_config: Any) -> float | None:
    """The term's coefficient; None if neither the user nor the model's config gives it."""
    if config.moe.coefficient is not None:
        return config.moe.coefficient
    found = (getattr(model_config, name, None) for name in COEFFICIENTS)
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def _check_unread(config: Config) -> Iterator[str]:
    """Coefficients that were given although there is no term."""
    remedy = "is read with moe.balance only; set that too (moe=global_batch), or leave it out"
    if config.moe.coefficient is not None:
        yield f"moe.coefficient={config.moe.coefficient}: {remedy}"
    given = text_fields(config.model.config)
    for name in COEFFICIENTS:
        # A model folder may have a coefficient; only values that the user typed are checked.
        if name in given:
            yield f"model.config.{name}={given[name]}: {remedy}"


def asked(config: Config) -> str:
    moe = config.moe
    keys = (
        ("balance", moe.balance, Balance.none),
        ("z_loss", moe.z_loss, 0),
        ("bias_update_rate", moe.bias_update_rate, 0),
    )
    return next(f"moe.{key}={value}" for key, value, unset in keys if value != unset)
