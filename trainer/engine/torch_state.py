"""State of the torch engine: whole for a checkpoint, and divided into each rank's share again.

A parameter and its optimizer states have the same placement: plain tensors that every replica holds, or DTensors of
which each rank holds a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from configs.errors import CheckpointMismatch
from configs.schema import Optimizer as Settings
from trainer.axes import PIPELINE
from trainer.engine.saved import BUFFER, Dealer, Saved
from trainer.model.layers import plain
from trainer.model.pieces import join, local_share
from trainer.model.roles import Described
from trainer.optim.protocol import COUNTER
from trainer.optim.table import ask, saved_state
from trainer.process.runtime import gather

Named = Mapping[str, torch.Tensor]


def full_tensor(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The whole tensor, on the communication device. A collective of the ranks that hold pieces of it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return plain(tensor)
    local = plain(tensor.to_local()).to(device)
    if local is not tensor.to_local():
        # With offload its pieces are in host memory, which the GPUs' collectives cannot reach.
        tensor = DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
    return join(tensor)


def gather_parameters(
    parameters: Named, mesh: DeviceMesh, device: torch.device
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every parameter of the model by name, whole on rank 0, one at a time. A collective over all ranks.

    parameters: those of this rank; under a pipeline each stage sends its own to the first.
    """
    group, mine = mesh.get_group(PIPELINE), mesh[PIPELINE].get_local_rank()
    held = [(name, p.shape, p.dtype) for name, p in parameters.items()]
    for owner, entries in enumerate(gather(held, group) if mesh[PIPELINE].size() > 1 else [held]):
        for name, shape, dtype in entries:
            complete = full_tensor(parameters[name], device).contiguous() if owner == mine else None
            if owner > 0 and complete is not None:
                dist.send(complete, group=group, group_dst=0)
            elif owner > 0 and mine == 0:
                complete = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(complete, group=group, group_src=owner)
            yield name, complete if mine == 0 else None


class States:
    """An optimizer's states, by the tables of its module. described: every parameter by name, unsharded."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: Settings, described: Mapping[str, Described]
    ) -> None:
        self.optimizer, self._settings, self._described = optimizer, settings, described

    def of(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a parameter that a checkpoint holds, in a fixed order; none before the first update."""
        state = self.optimizer.state.get(parameter, {})
        return {kind: state[kind] for kind in self._kinds(name, parameter) if kind in state}

    def make(self, name: str, parameter: torch.Tensor, *, steps: int) -> dict[str, torch.Tensor]:
        """Like `of`, created as after this many updates; their content is to be overwritten."""
        chosen = ask(self._settings)
        table = chosen.state(self._described[name], self._settings, _name(parameter.dtype))
        self.optimizer.state[parameter] = chosen.fresh(self.optimizer, parameter, table, steps=steps)
        return self.of(name, parameter)

    def steps(self, parameters: Named) -> int:
        """Number of updates that the optimizer has counted; 0 if it does not count."""
        known = self.optimizer.state
        counted = (state[COUNTER] for p in parameters.values() if COUNTER in (state := known.get(p, {})))
        return int(next(counted, 0))

    def _kinds(self, name: str, parameter: torch.Tensor) -> list[str]:
        if not parameter.requires_grad:
            return []
        return sorted(saved_state(self._described[name], self._settings, _name(parameter.dtype)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save_state(
    parameters: Named, states: States, *, holders: list[int], device: torch.device
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """As `Engine.state`. parameters: those of this rank by name. holders: the ranks with the same names."""
    dealer, rank = Dealer(holders), dist.get_rank()
    for name, parameter in parameters.items():
        tensors = {_model_kind(parameter): parameter, **states.of(name, parameter)}
        for kind, tensor in tensors.items():
            complete = full_tensor(tensor, device)
            yield f"{kind}/{name}", complete if dealer.owner(complete.nbytes) == rank else None


@torch.no_grad()
def load_state(parameters: Named, states: States, saved: Saved, *, steps: int) -> None:
    """Write this rank's share of every tensor into parameters and optimizer. steps: from `States.steps`."""
    stepped = bool(saved_kinds(saved))
    for name, parameter in parameters.items():
        kind = _model_kind(parameter)
        check_shape(saved, f"{kind}/{name}", parameter.shape)
        copy_share(parameter, saved.read(f"{kind}/{name}"))
        if stepped and parameter.requires_grad:
            for kind, tensor in states.make(name, parameter, steps=steps).items():
                check_shape(saved, f"{kind}/{name}", tensor.shape)
                copy_share(tensor, saved.read(f"{kind}/{name}"))


def _model_kind(parameter: torch.Tensor) -> str:
    """Parameters without gradient have no optimizer state; their values are under `model`."""
    return "model" if parameter.requires_grad else "frozen"


def saved_kinds(saved: Saved) -> list[str]:
    """The kinds of optimizer tensors in a checkpoint; none if it was saved before the first update."""
    return sorted({key.partition("/")[0] for key in saved.names()} - {"model", "frozen", "rng", BUFFER})


def check_shape(saved: Saved, key: str, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises CheckpointMismatch unless the checkpoint holds a tensor of this name and shape."""
    found = list(saved.shape(key)) if key in saved else "none"
    if found != list(shape):
        raise CheckpointMismatch(
            f"train.resume: the model wants {key} of shape {list(shape)}, the checkpoint holds {found};"
            " give the same model"
        )


def copy_share(target: torch.Tensor, complete: torch.Tensor) -> None:
    """Write this rank's share of `complete` (on the CPU, mapped from a file) into `target`, in its dtype and device."""
    if not isinstance(target, DTensor):
        target.copy_(complete)
        return
    mesh, placements = target.device_mesh, target.placements
    if all(type(placement) in (Shard, Replicate) for placement in placements):
        # A box of the whole tensor: only its bytes are read from the file.
        sizes, starts = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        share = complete[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
    else:
        share = local_share(complete, target)
    target.to_local().copy_(share)
