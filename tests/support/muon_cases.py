"""The work of a rank in tests/test_muon.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from trainer.estimate.tracker import Born, Died, StorageTracker
from trainer.model.pieces import join, local_share
from trainer.model.roles import Matrices
from trainer.optim.muon import exchange
from trainer.optim.muon.update import Muon
from trainer.optim.several import Several

Shapes = dict[str, tuple[int, ...]]
PACKED, STACKED = Matrices(parts=(12, 12, 12), dim=1, transposed=True), Matrices(stacked=True)
MATRICES: dict[str, tuple[tuple[int, ...], Matrices]] = {
    "wide": ((12, 20), Matrices()),
    "same": ((12, 20), Matrices()),
    "tall": ((32, 8), Matrices()),
    "uneven": ((7, 10), Matrices()),
    "conv": ((20, 12), Matrices(transposed=True)),
    "qkv": ((12, 36), PACKED),
    "grouped": ((16, 12), Matrices(parts=(8, 4, 4))),
    "gate_up": ((24, 10), Matrices(parts=(12, 12))),
    "experts": ((3, 6, 8), STACKED),
    "experts_gate_up": ((3, 16, 6), Matrices(parts=(8, 8), dim=1, stacked=True)),
    "key": ((2, 12), Matrices()),
}
VECTORS: Shapes = {"bias": (12,), "embedding": (17, 4)}
TENSOR: dict[str, Placement] = {
    "wide": Shard(0),
    "same": Shard(1),
    "tall": Shard(1),
    "conv": Shard(1),
    "qkv": _StridedShard(1, split_factor=3),
    "gate_up": _StridedShard(0, split_factor=2),
    "grouped": Shard(0),
    "experts": Shard(2),
    "experts_gate_up": _StridedShard(1, split_factor=2),
    "embedding": Shard(0),
}
"""Placements under tensor parallel; the others are replicated."""
LAYOUTS: dict[str, dict[str, int]] = {
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tensor": {"dp_shard": 1, "tp": 4},
    "tensor_fsdp": {"dp_shard": 2, "tp": 2},
    "tensor_data": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
}
CELLS = {"fsdp": (4, 1), "hsdp": (2, 2), "ddp": (1, 4)}
"""Number of ranks that shard a matrix, and number of replicas."""
WIDE = [(64, 128)] * 6 + [(128, 128)] * 3 + [(256, 64)] * 5
BUCKETS = (2**28, 37_500)
RATES = {"lr": 0.02, "weight_decay": 0.1}


def values(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random tensors, one for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**{name: shape for name, (shape, _) in MATRICES.items()}, **VECTORS}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def optimizer_of(parameters: dict[str, nn.Parameter], *, replicas: Any = None, **options: Any) -> Several:
    kept = {key: options.pop(key) for key in ("bucket_bytes",) if key in options}
    muon = [name for name in parameters if name in MATRICES]
    halves = (muon[::2], muon[1::2])
    groups = [
        {
            "optimizer": "muon",
            "params": [parameters[name] for name in names],
            "matrices": [MATRICES[name][1] for name in names],
            "dtype": torch.float64,
            **RATES,
            **options,
            "lr": lr,
        }
        for names, lr in zip(halves, (0.02, 0.03), strict=True)
    ]
    others = {"optimizer": "adamw", "params": [parameters[name] for name in VECTORS], "lr": 0.01, "weight_decay": 0.1}
    adamw = torch.optim.AdamW([others], fused=True)
    return Several({"muon": Muon(groups, replicas=replicas, **kept), "adamw": adamw})


def one_process(options: dict[str, Any], steps: int = 3) -> dict[str, torch.Tensor]:
    parameters = _parameters(values(0))
    optimizer = optimizer_of(parameters, **options)
    for step in range(steps):
        for name, value in values(step + 1).items():
            parameters[name].grad = value
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def cuts_and_bugs(options: list[dict[str, Any]]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Compare every layout with one process, without and with planted bugs.

    Returns two dictionaries:
    layout -> largest difference of any parameter, relative to the parameter's largest change.
    (bug, layout) -> the same difference with the bug planted.
    """
    dist.init_process_group("gloo")
    expected = [one_process(chosen) for chosen in options]
    meshes = {name: _mesh(sizes) for name, sizes in LAYOUTS.items()}
    sound = {
        name: max(_distance(_local_share(mesh), e, chosen) for e, chosen in zip(expected, options, strict=True))
        for name, mesh in meshes.items()
    }
    sound["ddp"] = _distance(_parameters(values(0)), expected[0], {**options[0], "replicas": dist.group.WORLD})
    planted = {}
    for bug, plant in PLANTED.items():
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            for name, mesh in meshes.items():
                planted[bug, name] = _distance(_local_share(mesh), expected[0], options[0])
    dist.destroy_process_group()
    return sound, planted


def costs() -> tuple[dict[str, dict[str, int]], dict[tuple[str, int], int]]:
    """Measure the second update.

    Returns two dictionaries:
    layout -> number of calls of each collective.
    (layout, bucket_bytes) -> peak bytes.
    """
    dist.init_process_group("gloo")
    calls, peaks = {}, {}
    for name, sizes in {**LAYOUTS, "ddp": {}}.items():
        parameters = _local_share(_mesh(sizes)) if sizes else _parameters(values(0))
        optimizer = optimizer_of(parameters, replicas=None if sizes else dist.group.WORLD)
        _step(optimizer, parameters, 1)
        with CommDebugMode() as counted:
            _step(optimizer, parameters, 2)
        calls[name] = {str(op).split(".")[-1]: times for op, times in counted.get_comm_counts().items() if times}
        for limit in BUCKETS if name in CELLS else ():
            peaks[name, limit] = peak_bytes(_mesh(sizes) if sizes else None, limit)
    dist.destroy_process_group()
    return calls, peaks


def peak_bytes(mesh: DeviceMesh | None, limit: int) -> int:
    """Minimum peak bytes over several updates of matrices with shapes WIDE, iterated in bfloat16.

    mesh: None for plain tensors.
    limit: `bucket_bytes`.
    """
    module = nn.Module()
    for number, shape in enumerate(WIDE):
        module.register_parameter(str(number), nn.Parameter(torch.ones(shape)))
    if mesh is not None:
        _shard(module, mesh)
    held = list(module.parameters())
    group = {"params": held, "matrices": [Matrices()] * len(held), "dtype": torch.bfloat16}
    optimizer = Muon([group], bucket_bytes=limit, replicas=dist.group.WORLD if mesh is None else None)
    for parameter in held:
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    # gloo's thread may release a collective's buffers late, which can only raise a peak. Take the minimum.
    return min(_peak_of(optimizer) for _ in range(4))


def _peak_of(optimizer: torch.optim.Optimizer) -> int:
    with StorageTracker() as tracker:
        optimizer.step()
    sizes: dict[int, int] = {}
    live = peak = 0
    for event in tracker.events:
        if isinstance(event, Born):
            sizes[event.number] = event.size_bytes
            live += event.size_bytes
            peak = max(peak, live)
        elif isinstance(event, Died):
            live -= sizes[event.number]
    return peak


def _parameters(tensors: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in tensors.items()}


def _mesh(sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _local_share(mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    names = mesh.mesh_dim_names or ()
    module = nn.Module()
    for name, value in values(0).items():
        if "tp" in names:
            placement = TENSOR.get(name, Replicate())
            value = distribute_tensor(value, mesh["tp"], [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(value))
    _shard(module, mesh)
    return dict(module.named_parameters())


def _shard(module: nn.Module, mesh: DeviceMesh) -> None:
    replicated = "dp_replicate" in (mesh.mesh_dim_names or ())
    fully_shard(module, mesh=mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"])


def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], step: int) -> None:
    for name, value in values(step).items():
        parameter = parameters[name]
        parameter.grad = _share(value, parameter) if isinstance(parameter, DTensor) else value
    optimizer.step()


def _distance(parameters: dict[str, nn.Parameter], expected: dict[str, torch.Tensor], options: dict[str, Any]) -> float:
    optimizer = optimizer_of(parameters, **options)
    for step in (1, 2, 3):
        _step(optimizer, parameters, step)
    start, worst = values(0), 0.0
    for name, parameter in parameters.items():
        for state in optimizer.state[parameter].values():
            assert state.ndim == 0 or isinstance(state, DTensor) == isinstance(parameter, DTensor), name
        value = parameter.detach()
        whole = join(value) if isinstance(value, DTensor) else value
        scale = (expected[name] - start[name]).abs().max()
        worst = max(worst, ((whole - expected[name]).abs().max() / scale).item())
    return math.inf if math.isnan(worst) else worst


def _share(whole: torch.Tensor, like: DTensor) -> DTensor:
    share = local_share(whole, like)
    return DTensor.from_local(share, like.device_mesh, like.placements, shape=whole.shape, stride=whole.stride())


def _owner_swaps(patch: pytest.MonkeyPatch) -> None:
    """The owner swaps the updates of two matrices of the same shape."""
    by_job = exchange._by_job

    def swapped(layout: exchange.Layout) -> dict[int, list[exchange.Entry]]:
        found = by_job(layout)
        shapes = {job: [entry.piece.runs[-2:] for entry in entries] for job, entries in found.items()}
        pairs = [(one, two) for one in found for two in found if one < two and shapes[one] == shapes[two]]
        if pairs and next(calls) % 2:
            one, two = pairs[0]
            found[one], found[two] = found[two], found[one]
        return found

    calls = itertools.count()
    patch.setattr(exchange, "_by_job", swapped)


def _local_pieces(patch: pytest.MonkeyPatch) -> None:
    """Each rank orthogonalises its local piece as if it were a whole matrix."""

    def run(self: exchange.Fleet, fill: Any, iterate: Any, dtypes: Any, apply: Any) -> None:
        for number, job in enumerate(self.jobs):
            piece = self._piece(number, self.cells.place)
            if piece is not None:
                update = torch.empty(piece.shape, dtype=torch.float64)
                fill(job, piece, update)
                apply(job, piece, iterate(job.group, update))

    patch.setattr(exchange.Fleet, "run", run)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {"swapped": _owner_swaps, "local": _local_pieces}
