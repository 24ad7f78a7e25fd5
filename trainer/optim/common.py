"""Answers that most optimizers share. A module imports those that it uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs.choices import BYTES, Implementation
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.optim.protocol import COUNTER, Group, Held, Kept, State, Work

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = (Implementation.for_loop,)
OPTIONS: type | None = None
ZEROED = True


def groups(parameters: Sequence[tuple[Described, torch.nn.Parameter]], settings: Settings) -> list[Group]:
    """Two groups: matrices and embeddings decay, norms and biases do not. If they lie on several meshes, each mesh has
    its own groups: torch updates the DTensors of a group together."""
    found: list[Group] = []
    for name, decays, weight_decay in (("decayed", True, settings.weight_decay), ("plain", False, 0.0)):
        by_mesh: dict[Any, list[tuple[Described, torch.nn.Parameter]]] = {}
        for described, parameter in parameters:
            if (len(described.shape) >= 2) is decays:
                by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append((described, parameter))
        found += [Group(name=name, parameters=tuple(items), weight_decay=weight_decay) for items in by_mesh.values()]
    return found


def instead(parameter: Described, settings: Settings) -> Settings | None:
    """It updates every parameter itself."""


def like(parameter: Described, dtype: str, *kinds: str) -> dict[str, Kept]:
    """Tensors of the parameter's own shape and dtype."""
    return {kind: Kept(shape=parameter.shape, dtype=dtype) for kind in kinds}


def counter(*, host: bool = True) -> dict[str, Kept]:
    """A fused kernel's counter lies where the parameter does."""
    return {COUNTER: Kept(shape=(), dtype="float32", host=host)}


def fresh(built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int) -> dict[str, Any]:
    """Zeros, placed as the parameter is, and the counter as torch makes it: the fused kernels read it on the
    parameter's device."""
    import torch

    from trainer.optim.placed import zeros

    made: dict[str, Any] = {}
    for kind, kept in state.items():
        if kind == COUNTER:
            device = "cpu" if kept.host else parameter.device
            made[kind] = torch.tensor(float(steps), dtype=torch.float32, device=device)
        elif kept.host:
            made[kind] = torch.zeros(kept.shape, dtype=getattr(torch, kept.dtype))
        else:
            made[kind] = zeros(parameter, kept.shape, getattr(torch, kept.dtype), paged=kept.paged)
    return made


def kernel(implementation: Implementation) -> Mapping[str, Any]:
    """torch's arguments for an implementation."""
    return {"fused": implementation is Implementation.fused, "foreach": implementation is Implementation.foreach}


def nbytes(held: Sequence[Held], dtype: str) -> list[int]:
    return [one.piece.numel * BYTES[dtype] for one in held]


def work(parameter: Described, settings: Settings) -> Work:
    """The update takes as long as its memory traffic."""
    return Work()


def average(settings: Settings) -> None:
    """The trained weights are those to evaluate."""
