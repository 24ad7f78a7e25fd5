"""The optimizers by name, and questions about the one that a configuration names. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from configs.choices import OptimizerName
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim import (
    adafactor,
    adamw,
    adamw_8bit,
    by_role,
    common,
    custom,
    ema,
    lion,
    mezo,
    muon,
    paged,
    schedule_free,
    sgd,
)
from trainer.optim.parts import NAME, Parts, named
from trainer.optim.protocol import COUNTER, Kept, Optimizer, State

OPTIMIZERS: Mapping[OptimizerName, Optimizer] = {
    OptimizerName.adamw: adamw,
    OptimizerName.sgd: sgd,
    OptimizerName.adafactor: adafactor,
    OptimizerName.adamw_8bit: adamw_8bit,
    OptimizerName.muon: muon,
    OptimizerName.lion: lion,
    OptimizerName.schedule_free: schedule_free,
    OptimizerName.mezo: mezo,
    OptimizerName.custom: custom,
}

LEANER = {OptimizerName.adamw: OptimizerName.adamw_8bit}
AVERAGE = "optimizer.average"


def ask(settings: Settings) -> Optimizer:
    chosen = OPTIMIZERS[settings.name]
    alone = chosen.instead is common.instead and not by_role.names(settings)
    whole = chosen if alone else Parts(OPTIMIZERS, settings)
    whole = paged.Paged(whole) if settings.paged else whole
    return ema.Averaging(whole) if settings.ema else whole


def chosen_by(settings: Settings, optimizer: object) -> str | None:
    """The key=value that chooses an optimizer; None if nothing does."""
    found = (f"{key}={one.name}" for key, one in named(settings).items() if OPTIMIZERS[one.name] is optimizer)
    return next(found, None)


def plain(name: str) -> Settings:
    """One optimizer for all parameters."""
    return Settings(name=OptimizerName(name))


def leaner(settings: Settings) -> tuple[str, dict[str, object]] | None:
    """An optimizer that keeps less for the same update, in words and as overrides; None if there is none."""
    found = LEANER.get(settings.name)
    return None if found is None else ("the same update from smaller states", {NAME: found})


def usual() -> tuple[str, str]:
    """Two that make the same update, to compare: the default, and what keeps less."""
    return str(Settings().name), str(LEANER[Settings().name])


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that the states in a checkpoint depend on."""
    average = ask(settings).average(settings)
    return {
        NAME: str(settings.name),
        by_role.KEY: {role: str(name) for role, name in by_role.names(settings).items()},
        **({"optimizer.target": settings.target} if settings.target else {}),
        "optimizer.ema": settings.ema > 0,
        **({AVERAGE: [average.kind, average.part]} if average else {}),
    }


def saved_state(parameter: Described, settings: Settings, dtype: str) -> State:
    """A parameter's tensors in a checkpoint besides its values."""
    state = ask(settings).state(parameter, settings, dtype)
    return {kind: kept for kind, kept in state.items() if kind != COUNTER}


def saved_kinds(parameters: Iterable[Described], settings: Settings) -> dict[str, frozenset[str]]:
    """The kinds of tensors that a checkpoint holds for each parameter besides its values."""
    return {parameter.name: frozenset(saved_state(parameter, settings, "float32")) for parameter in parameters}


def kept(parameter: Described, settings: Settings, dtype: str) -> list[Kept]:
    """A parameter's own states in its own memory."""
    state = ask(settings).state(parameter, settings, dtype)
    return [tensor for tensor in state.values() if not (tensor.host or tensor.paged)]


def paged_bytes(parameters: Iterable[Described], settings: Settings, dtype: str) -> int:
    """States in memory that a GPU and its host share."""
    states = (ask(settings).state(about, settings, dtype).values() for about in parameters)
    return sum(tensor.nbytes for state in states for tensor in state if tensor.paged)


def kept_bytes(parameters: Iterable[Described], settings: Settings, dtype: str) -> int:
    """Only the states, without counters."""
    return sum(tensor.nbytes for about in parameters for tensor in saved_state(about, settings, dtype).values())


def difference(key: str, name: str, other: str) -> str:
    """The states of two optimizers for a matrix, in words; empty for another key of `identity`, or an unknown name."""
    kinds = []
    for one in (name, other):
        if key != NAME or one not in OPTIMIZERS:
            return ""
        state = saved_state(by_role.typical("matrix"), plain(one), "float32")
        kinds.append(f"{one} keeps {' and '.join(state) or 'nothing'}")
    return f" ({kinds[0]} of a matrix, {kinds[1]})"


def keeping(kinds: Set[str]) -> str | None:
    """The first optimizer that keeps tensors of these kinds for a matrix, by its name."""
    about = by_role.typical("matrix")
    found = (name for name in OPTIMIZERS if name is not OptimizerName.custom)
    return next((str(name) for name in found if set(saved_state(about, plain(name), "float32")) == kinds), None)


def moments(settings: Settings, *, most: bool = False) -> float:
    """Numbers that the optimizer keeps in the parameters' memory, per parameter, minimum or maximum; a one-byte number
    counts a quarter. Sides of a matrix count as zero here."""
    likely = [by_role.typical(role) for role in {"matrix", "embedding", *by_role.names(settings)}]
    tables = [one for one in likely if len(one.shape) > 1]
    ratios = [sum(tensor.nbytes for tensor in kept(one, settings, "float32")) / (4 * one.numel) for one in tables]
    return max(ratios) if most else min(ratios)
