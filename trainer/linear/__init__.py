"""Kinds of linear layers, each a module of this folder that answers every question about itself. Torch-free.

    plain       x W + b, all of it trained
    four_bit    W frozen, in 4-bit codes                 tuning=qlora
    adapter     W frozen, B A x added to its result      tuning=lora, qlora
    float8      W and x cast to 8 bits for each product  precision=fp8
    scaled      W frozen, its features multiplied        tuning=ia3
    bottleneck  the MLP frozen, two matrices behind it   tuning=adapter

The kinds of `trainer.inputs`, which do not change linear layers but the model's inputs, answer the same questions and
are in the same table.

Kinds combine in the order of KINDS: each converts the layers that earlier kinds have left. At that point the model is
on the meta device and unsplit, so every later pass divides, shards and fills the converted layers. A further kind is
one module, an entry in KINDS and the config value that chooses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from configs.adapter_folder import OWN_KIND
from configs.choices import TuningMethod
from configs.schema import Config, Tuning
from trainer import inputs
from trainer.linear import adapter, bottleneck, float8, four_bit, plain, scaled
from trainer.linear.common import EightBits

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Kind(Protocol):
    """A module with these functions. Those after `problems` are called only for kinds that the config chooses."""

    __name__: str

    @property
    def KEEPS_MODEL(self) -> bool:
        """Whether the model's own parameters are trained, and saved, in layers of this kind."""
        ...

    @staticmethod
    def chosen(config: Config) -> bool: ...

    @staticmethod
    def problems(config: Config) -> Iterator[str]:
        """Refusals of this kind, and keys that only it reads if it is not chosen. One line each."""
        ...

    @staticmethod
    def convert(model: PreTrainedModel, config: Config, untrained: Collection[str]) -> None:
        """Make layers of this kind, on the meta device. untrained: names of parameters that get no gradient."""
        ...

    @staticmethod
    def imitate(model: PreTrainedModel, config: Config) -> None:
        """Add this kind's parameters to a small model with values, for a check of its computation."""
        ...

    @staticmethod
    def owns(name: str) -> bool:
        """Whether this kind has added the parameter of that name. The others are the model's."""
        ...

    @staticmethod
    def fill(unit: Any, prefix: str, keys: list[str], tuning: Tuning, generator: Any) -> None:
        """Write the initial values of this kind's parameters in a unit. The unit's others are filled and complete.
        prefix: of the unit's names. generator: random numbers by a parameter's name and device."""
        ...

    @staticmethod
    def report(model: PreTrainedModel) -> None:
        """Log which parameters of the converted, unsplit model are trained."""
        ...

    @staticmethod
    def identity(config: Config) -> dict[str, Any]:
        """The settings besides the model that a checkpoint's parameters depend on."""
        ...

    @staticmethod
    def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
        """Add the saved parameters of this kind, for a checkpoint of this identity, to a model on the meta device."""
        ...

    @staticmethod
    def exported(described: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """As peft writes what this kind has added."""
        ...

    @staticmethod
    def matmuls() -> set[object]:
        """Operations that are matmuls: selective recompute keeps the results of every second one."""
        ...

    @staticmethod
    def settle(modules: Iterable[nn.Module]) -> None:
        """Called when parameters have new values: after they were filled, loaded or updated. A collective."""
        ...

    @staticmethod
    def description(config: Config) -> str:
        """The plan's text about it; may be empty."""
        ...

    @staticmethod
    def traced(config: Config) -> Any:
        """The settings that affect bytes and operations of a layer, for the key of an estimate's profile."""
        ...


KEY = "tuning.method"
BARE = adapter.BARE
KINDS: tuple[Kind, ...] = (plain, four_bit, adapter, scaled, bottleneck, float8, *inputs.KINDS)


def chosen(config: Config) -> list[Kind]:
    return [kind for kind in KINDS if kind.chosen(config)]


def lighter(config: Config) -> tuple[str, dict[str, object]] | None:
    """A change that trains less of the model than this config, in words and as overrides; None if there is none."""
    return adapter.LIGHTER if plain.chosen(config) else None


def problems(config: Config) -> Iterator[str]:
    for kind in KINDS:
        yield from kind.problems(config)
    yield from inputs.problems(config)


def convert(model: PreTrainedModel, config: Config, untrained: Collection[str] = ()) -> None:
    """The first pass. Raises ConfigError for a model without such layers, EnvironmentProblem without a library."""
    for kind in chosen(config):
        kind.convert(model, config, untrained)


def imitate(model: PreTrainedModel, config: Config) -> None:
    for kind in chosen(config):
        kind.imitate(model, config)


def owner_of(name: str) -> Kind | None:
    """The kind that has added the parameter of this name; None for one of the model's own."""
    return next((kind for kind in KINDS if kind.owns(name)), None)


def report(model: PreTrainedModel, config: Config) -> None:
    for kind in chosen(config):
        kind.report(model)


def keeps_model(config: Config) -> bool:
    """Whether the model's own parameters are trained and saved; else only those that kinds have added."""
    return all(kind.KEEPS_MODEL for kind in chosen(config))


def setting(config: Config) -> str:
    """The setting that decides whether the model's own parameters are trained."""
    return f"{KEY}={config.tuning.method}"


def identity(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {KEY: str(config.tuning.method)}
    for kind in chosen(config):
        found |= kind.identity(config)
    return found


def kept_model(identity: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of this identity holds the model's own parameters, and none that kinds have added."""
    return identity.get(KEY, TuningMethod.full) == TuningMethod.full


def restore(model: PreTrainedModel, identity: Mapping[str, Any]) -> None:
    for kind in KINDS:
        kind.restore(model, identity)


def eight_bits(config: Config) -> EightBits | None:
    """How the layers multiply in 8 bits; None where none does."""
    return float8.eight_bits(config) if float8.chosen(config) else None


def exported(described: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """What the file of an adapter holds. described: the model's `peft_config`. tensors: what is trained, by name."""
    # Kinds of virtual tokens have their parameters under one name, and their own forms in peft.
    of_inputs = (kind for kind in inputs.KINDS if kind.peft == described.peft_type)
    kind = next(of_inputs, None) or next(kind for kind in map(owner_of, tensors) if kind is not None)
    return kind.exported(described, tensors)


def ours(said: Mapping[str, Any]) -> ModuleType | None:
    """The kind that loads an adapter by itself, since peft does not know it. said: the adapter's description."""
    return bottleneck if said.get("peft_type") == OWN_KIND else None


def settle(modules: Iterable[nn.Module], config: Config) -> None:
    for kind in chosen(config):
        kind.settle(modules)


def description(config: Config) -> str:
    return "; ".join(said for kind in chosen(config) if (said := kind.description(config)))


def traced(config: Config) -> list[Any]:
    return [[kind.__name__, kind.traced(config)] for kind in chosen(config)]


def matmuls() -> set[object]:
    """Of all kinds: recompute need not know which of them a model has."""
    return set[object]().union(*(kind.matmuls() for kind in KINDS))
