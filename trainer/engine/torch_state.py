"""State of the torch engine, whole for a checkpoint and cut to this rank's share again.

A parameter and its optimizer states are placed alike: plain tensors that every replica holds, or DTensors of which
each rank holds a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from configs.errors import CheckpointMismatch
from trainer.engine.saved import BUFFER, Dealer, Saved
from trainer.model.pieces import cut, join
from trainer.optim.adamw_8bit import CONSTANT

Named = Mapping[str, torch.Tensor]


def whole(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All of a tensor, on the device that communicates. A collective of the ranks that hold pieces of it."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device != device:
        # Offloaded: its pieces are in host memory, where the GPUs' collectives cannot reach them.
        local = tensor.to_local().to(device)
        tensor = DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
    return join(tensor)


def gather(parameters: Named, mesh: DeviceMesh, device: torch.device) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every parameter of the model by name, whole on rank 0, one at a time. A collective over all ranks.

    parameters: those of this rank; under a pipeline each stage sends its own to the first.
    """
    group, mine = mesh.get_group("pp"), mesh["pp"].get_local_rank()
    held = [(name, p.shape, p.dtype) for name, p in parameters.items()]
    names: list[list[tuple[str, torch.Size, torch.dtype]]] = [held] * mesh["pp"].size()
    if mesh["pp"].size() > 1:
        dist.all_gather_object(names, held, group=group)
    for owner, entries in enumerate(names):
        for name, shape, dtype in entries:
            complete = whole(parameters[name], device).contiguous() if owner == mine else None
            if owner > 0 and complete is not None:
                dist.send(complete, group=group, group_dst=0)
            elif owner > 0 and mine == 0:
                complete = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(complete, group=group, group_src=owner)
            yield name, complete if mine == 0 else None


def save_state(
    parameters: Named, optimizer: torch.optim.Optimizer, *, holders: list[int], device: torch.device
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """As `Engine.state`. parameters: those of this rank by name. holders: the ranks that have the same names."""
    dealer, rank = Dealer(holders), dist.get_rank()
    for name, parameter in parameters.items():
        tensors = {_model_kind(parameter): parameter, **_states(optimizer, parameter)}
        for kind, tensor in tensors.items():
            complete = whole(tensor, device)
            yield f"{kind}/{name}", complete if dealer.owner(complete.nbytes) == rank else None


def optimizer_steps(parameters: Named, optimizer: torch.optim.Optimizer) -> int:
    """Updates that Adam or Adafactor has counted; 0 for an optimizer that counts none."""
    counted = (state["step"] for p in parameters.values() if "step" in (state := optimizer.state.get(p, {})))
    return int(next(counted, 0))


@torch.no_grad()
def load_state(parameters: Named, optimizer: torch.optim.Optimizer, saved: Saved, *, steps: int) -> None:
    """Write this rank's share of every tensor into parameters and optimizer. steps: as `optimizer_steps` gave."""
    kinds = saved_kinds(saved)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        kind = _model_kind(parameter)
        check_shape(saved, f"{kind}/{name}", parameter.shape)
        copy_share(parameter, saved.read(f"{kind}/{name}"))
        if not kinds or not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        state |= _empty_states(optimizer, parameter, kinds)
        for kind, tensor in _states(optimizer, parameter).items():
            check_shape(saved, f"{kind}/{name}", tensor.shape)
            copy_share(tensor, saved.read(f"{kind}/{name}"))
        if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adafactor):
            # As torch makes it: the fused kernels read it where the parameter is.
            fused = groups[id(parameter)].get("fused", False)
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device if fused else "cpu")
        elif "step" in state:
            state["step"] = steps


def _model_kind(parameter: torch.Tensor) -> str:
    """Parameters that get no gradient have no optimizer state, which is asked of those below `model`."""
    return "model" if parameter.requires_grad else "frozen"


def saved_kinds(saved: Saved) -> list[str]:
    """The optimizer's tensors that a checkpoint holds per parameter: exp_avg and exp_avg_sq, or momentum_buffer, or
    Adafactor's, of which `state_shape` tells, or those of 8-bit AdamW, which makes them itself."""
    return sorted({key.partition("/")[0] for key in saved.names()} - {"model", "frozen", "rng", BUFFER})


def state_shape(kind: str, shape: torch.Size) -> torch.Size | None:
    """The shape of a parameter's optimizer tensor; None where it has none of that kind. Adafactor keeps the row and
    column means of whatever has rows and columns, and of vectors the second moment itself."""
    if kind not in ("row_var", "col_var", "variance"):
        return shape
    if (kind == "variance") is (len(shape) > 1):
        return None
    match kind:
        case "row_var":
            return torch.Size((*shape[:-1], 1))
        case "col_var":
            return torch.Size((*shape[:-2], 1, shape[-1]))
        case _:
            return shape


def check_shape(saved: Saved, key: str, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises CheckpointMismatch unless the checkpoint holds a tensor of this name and shape."""
    found = list(saved.shape(key)) if key in saved else "none"
    if found != list(shape):
        raise CheckpointMismatch(
            f"train.resume: the model wants {key} of shape {list(shape)}, the checkpoint holds {found};"
            " give the same model"
        )


def copy_share(target: torch.Tensor, complete: torch.Tensor) -> None:
    """Write this rank's share of `complete` (on the CPU, mapped from a file) into `target`, in its dtype and place."""
    if not isinstance(target, DTensor):
        target.copy_(complete)
        return
    mesh, placements = target.device_mesh, target.placements
    if all(type(placement) in (Shard, Replicate) for placement in placements):
        # A box of the whole tensor: only its bytes are read from the file.
        sizes, starts = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        share = complete[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
    else:
        share = cut(complete, target)
    target.to_local().copy_(share)


def _empty_states(optimizer: Any, parameter: torch.Tensor, kinds: list[str]) -> dict[str, Any]:
    """Tensors for what a checkpoint holds of these kinds."""
    if hasattr(optimizer, "empty_states"):
        return optimizer.empty_states(parameter)
    shapes = {kind: state_shape(kind, parameter.shape) for kind in kinds}
    return {
        kind: torch.zeros_like(parameter) if shape == parameter.shape else parameter.new_zeros(shape)
        for kind, shape in shapes.items()
        if shape is not None
    }


def _states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a parameter, in a fixed order, without those that never change."""
    state = optimizer.state.get(parameter, {})
    kinds = sorted(state.keys() - {"step", *CONSTANT})
    return {kind: state[kind] for kind in kinds if isinstance(state[kind], torch.Tensor)}
