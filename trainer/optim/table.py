"""The optimizers by name, and what others ask of the one that a configuration names. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from configs.choices import OptimizerName
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described, Matrices, Role
from trainer.optim import adafactor, adamw, adamw_8bit, custom, lion, mezo, muon, schedule_free, sgd
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


def ask(settings: Settings) -> Optimizer:
    return OPTIMIZERS[settings.name]


def saved_state(parameter: Described, settings: Settings, dtype: str) -> State:
    """What a checkpoint holds of a parameter besides its values."""
    state = ask(settings).state(parameter, settings, dtype)
    return {kind: kept for kind, kept in state.items() if kind != COUNTER}


def saved_kinds(parameters: Iterable[Described], settings: Settings) -> dict[str, frozenset[str]]:
    """The kinds of tensors that a checkpoint holds of each parameter besides its values."""
    return {parameter.name: frozenset(saved_state(parameter, settings, "float32")) for parameter in parameters}


def kept(parameter: Described, settings: Settings, dtype: str) -> list[Kept]:
    """What each parameter has for itself in the memory where it lies itself."""
    state = ask(settings).state(parameter, settings, dtype)
    return [tensor for tensor in state.values() if not tensor.host]


def kept_bytes(parameters: Iterable[Described], settings: Settings, dtype: str) -> int:
    """Of the states alone, without counters."""
    return sum(tensor.nbytes for about in parameters for tensor in saved_state(about, settings, dtype).values())


def difference(name: str, other: str) -> str:
    """What two optimizers keep of a matrix, in words; nothing for a name that is none."""
    kinds = []
    for one in (name, other):
        if one not in OPTIMIZERS:
            return ""
        about = Described(name="", shape=(2**20, 2**20), role=Role.matrix, matrices=Matrices())
        state = saved_state(about, Settings(name=OptimizerName(one)), "float32")
        kinds.append(f"{one} keeps {' and '.join(state) or 'nothing'}")
    return f" ({kinds[0]} of a matrix, {kinds[1]})"


def moments(settings: Settings, *, most: bool = False) -> float:
    """Numbers that the optimizer keeps per number of any parameter, at least or at most; one of one byte counts a
    quarter. Sides of a matrix count nothing here."""
    endless = (2**40, 2**40)
    matrix = Described(name="", shape=endless, role=Role.matrix, matrices=Matrices())
    table = Described(name="", shape=endless, role=Role.embedding)
    ratios = [kept_bytes([one], settings, "float32") / (4 * one.numel) for one in (matrix, table)]
    return max(ratios) if most else min(ratios)
