"""The work of a rank in tests/test_sharded_states.py: an optimizer updates sharded parameters and whole ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

from configs.load import load_config
from configs.schema import Optimizer
from tests.support.muon_cases import LAYOUTS
from trainer.model.pieces import join, local_share
from trainer.model.roles import Described, Matrices, Role
from trainer.optim import managed, paged, placed
from trainer.optim.build import build_optimizer
from trainer.optim.protocol import COUNTER
from trainer.optim.table import ask

SHAPES: dict[str, tuple[tuple[int, ...], Role]] = {
    "rows": ((40, 128), Role.matrix),
    "columns": ((12, 1030), Role.matrix),
    "uneven": ((7, 700), Role.matrix),
    "qkv": ((12, 1080), Role.packed),
    "gate_up": ((24, 300), Role.packed),
    "experts": ((3, 6, 320), Role.experts),
    "small": ((2, 12), Role.matrix),
    "embedding": ((17, 300), Role.embedding),
    "bias": ((13,), Role.vector),
}
TENSOR: dict[str, Placement] = {
    "rows": Shard(0),
    "columns": Shard(1),
    "qkv": _StridedShard(1, split_factor=3),
    "gate_up": _StridedShard(0, split_factor=2),
    "experts": Shard(2),
    "embedding": Shard(0),
}
"""Placements under tensor parallel; the others are replicated. Column shards end inside blocks of 256."""
STEPS = 3
PAGED = "optimizer.paged=true"
Values = dict[str, torch.Tensor]


@functools.cache
def settings_of(words: tuple[str, ...]) -> Optimizer:
    return load_config(words).optimizer


@functools.cache
def described() -> dict[str, Described]:
    matrices = {name: Matrices(stacked=len(shape) == 3) for name, (shape, _) in SHAPES.items() if len(shape) > 1}
    return {
        name: Described(name=name, shape=shape, role=role, matrices=matrices.get(name))
        for name, (shape, role) in SHAPES.items()
    }


def values(seed: int) -> Values:
    """Random tensors whose rows differ widely in size, like those of gradients."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (shape, _) in SHAPES.items():
        sizes = torch.logspace(-3, 0, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * sizes
    return found


def run(parameters: dict[str, nn.Parameter], words: list[str], *, replicas: Any = None) -> torch.optim.Optimizer:
    optimizer = build_optimizer(parameters.items(), described(), settings_of(tuple(words)), replicas=replicas)
    for step in range(STEPS):
        update(optimizer, parameters, step + 1)
    return optimizer


def update(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], step: int) -> None:
    for name, value in values(step).items():
        parameter = parameters[name]
        parameter.grad = share(value, parameter) if isinstance(parameter, DTensor) else value
    optimizer.step()


def whole_state(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Values:
    """Full tensors of the parameters (key NAME) and of the optimizer states (key NAME KIND)."""
    found = {}
    for name, parameter in parameters.items():
        state = {kind: t for kind, t in optimizer.state[parameter].items() if isinstance(t, torch.Tensor)}
        for kind, tensor in {"": parameter.detach(), **state}.items():
            if kind != COUNTER:
                found[f"{name} {kind}".strip()] = join(tensor) if isinstance(tensor, DTensor) else tensor
    return found


def plain() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in values(0).items()}


def one_process(words: list[str]) -> Values:
    parameters = plain()
    return whole_state(parameters, run(parameters, words))


def cut_parameters(mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    names = mesh.mesh_dim_names or ()
    module = nn.Module()
    for name, value in values(0).items():
        if "tp" in names:
            placement = TENSOR.get(name, Replicate())
            value = distribute_tensor(value, mesh["tp"], [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(value))
    replicated = "dp_replicate" in names
    fully_shard(module, mesh=mesh["dp_replicate", "dp_shard"] if replicated else mesh["dp_shard"])
    return dict(module.named_parameters())


def apart(found: Values, expected: Values) -> float:
    """Largest relative difference.

    A parameter's difference is relative to its largest change, a state's to its largest element. Quantized codes
    contribute the fraction that differs.
    """
    start, worst = values(0), 0.0
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        change = value - start[name] if name in start else value
        difference = (found[name].double() - value.double()).abs()
        if value.dtype is torch.uint8:
            worst = max(worst, difference.gt(0).double().mean().item())
        else:
            worst = max(worst, (difference.max() / change.double().abs().max().clamp(min=1e-30)).item())
    return math.inf if math.isnan(worst) else worst


def cuts_and_bugs(
    optimizers: dict[str, list[str]], layouts: Sequence[str], bugs: dict[str, list[str]]
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float], dict[tuple[str, str], int]]:
    """Compare each optimizer under each layout with one process.

    Returns three dictionaries:
    (optimizer, layout) -> difference from one process.
    (bug, optimizer) -> the same difference with the bug planted.
    (optimizer, layout) -> number of collectives in one update.
    """
    dist.init_process_group("gloo")
    meshes = {name: _mesh(LAYOUTS[name]) for name in layouts}
    expected = {name: one_process([word for word in words if word != PAGED]) for name, words in optimizers.items()}
    sound, calls = {}, {}
    pages = pages_on_cpu()
    for name, words in optimizers.items():
        for layout, mesh in meshes.items():
            parameters = cut_parameters(mesh)
            optimizer = run(parameters, words)
            sound[name, layout] = apart(whole_state(parameters, optimizer), expected[name])
            assert bool(pages.made) is (PAGED in words), (name, layout)
            _check_pieces(parameters, optimizer, words)
            with CommDebugMode() as counted:
                update(optimizer, parameters, STEPS + 1)
            calls[name, layout] = sum(counted.get_comm_counts().values())
            pages.made.clear()
    planted = {}
    for bug, names in bugs.items():
        with pytest.MonkeyPatch.context() as patch:
            PLANTED[bug](patch)
            for name in names:
                parameters = cut_parameters(meshes["tensor_fsdp"])
                found = whole_state(parameters, run(parameters, optimizers[name]))
                planted[bug, name] = apart(found, expected[name])
    dist.destroy_process_group()
    pages.undo()
    return sound, planted, calls


@dataclass
class Pages:
    """Records the tensors that `managed.zeros` made."""

    patch: pytest.MonkeyPatch
    made: list[torch.Tensor] = field(default_factory=list)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.made.append(torch.zeros(tuple(shape), dtype=dtype, device=device))
        return self.made[-1]

    def undo(self) -> None:
        self.patch.undo()


def pages_on_cpu(smallest: int = 1000) -> Pages:
    """Replace memory that the GPU shares with the CPU by plain CPU memory.

    smallest: minimum number of values of a parameter whose states are paged.
    """
    pages = Pages(pytest.MonkeyPatch())
    pages.patch.setattr(managed, "zeros", pages.zeros)
    pages.patch.setattr(paged, "SMALLEST", smallest)
    return pages


def _check_pieces(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, words: list[str]) -> None:
    """Check that a rank's states have the table's bytes and the placements that a checkpoint is read into."""
    settings = settings_of(tuple(words))
    for name, parameter in parameters.items():
        about = described()[name]
        assert isinstance(parameter, DTensor)
        table = ask(settings).state(about.cut(tuple(parameter.to_local().shape)), settings, "float64")
        made = ask(settings).fresh(optimizer, parameter, ask(settings).state(about, settings, "float64"), steps=2)
        for kind, kept in table.items():
            for state in (optimizer.state[parameter][kind], made[kind]):
                tensor = state if isinstance(state, torch.Tensor) else torch.tensor(state)
                piece = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if kind != COUNTER:
                    assert piece.nbytes == kept.nbytes, (name, kind)
                    assert getattr(state, "placements", None) == getattr(made[kind], "placements", None)


def share(whole: torch.Tensor, like: DTensor) -> DTensor:
    piece = local_share(whole, like)
    return DTensor.from_local(piece, like.device_mesh, like.placements, shape=whole.shape, stride=whole.stride())


def _mesh(sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def _alone(patch: pytest.MonkeyPatch) -> None:
    """Each rank uses the statistics of its own shard only."""
    patch.setattr(placed.dist, "all_reduce", lambda *args, **options: None)


def _one_axis(patch: pytest.MonkeyPatch) -> None:
    """Only the ranks of the first mesh axis reduce with each other."""
    sharding_groups = placed.sharding_groups
    patch.setattr(placed, "sharding_groups", lambda parameter, dims: sharding_groups(parameter, dims)[:1])


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {"alone": _alone, "one_axis": _one_axis}
