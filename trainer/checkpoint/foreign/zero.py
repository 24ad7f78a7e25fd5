"""A save by DeepSpeed's ZeRO 1, 2 or 3: parameters and their optimizer states by name, from any number of ranks.

The files of all ranks are mapped, never read whole: a parameter costs its own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointDamaged, CheckpointMismatch
from trainer.checkpoint.foreign import inert, pickles
from trainer.checkpoint.foreign.source import MODEL
from trainer.checkpoint.foreign.zero_files import complete, find_files
from trainer.checkpoint.foreign.zero_places import (
    Misplaced,
    Place,
    Shape,
    from_partitions,
    from_slices,
    needed,
)


@dataclass(frozen=True, slots=True)
class Rank:
    """The rows of one rank, by kind: master weights (`model`) and optimizer states. groups: of the optimizer."""

    stage: int
    rows: Sequence[Mapping[str, torch.Tensor]]
    steps: Sequence[Any]
    groups: Sequence[Mapping[str, Any]]
    content: Mapping[str, Any]


class ZeroSave:
    """Opening it reads the small parts of every file, and checks that they belong together.

    model: content of the first model file besides tensors. groups: the optimizer's settings. scaler: of float16.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, files = folder, find_files(folder)
        self._models = [load(path) for path in files.model]
        self._ranks = [_rank(path) for path in files.optimizer]
        first = self._ranks[0]
        self.model: Mapping[str, Any] = self._models[0]
        self.stage, self.groups, self.scaler = first.stage, first.groups, first.content.get("loss_scaler")
        with complete(files.model[0]):
            self._check_ranks(files.partitioned)
            self._shapes = [
                {name: tuple(shape) for name, shape in named.items()} for named in self.model["param_shapes"]
            ]
            self._frozen = self._find_frozen()
        with complete(folder):
            self._places = self._find_places()
            self._kinds = sorted({kind for row in first.rows for kind in row} - {MODEL})
            self._check_rows()

    @property
    def ranks(self) -> int:
        return len(self._ranks)

    @property
    def updates(self) -> int | None:
        """As the optimizer counts them for bias correction, in its states or its groups; None if it does not count."""
        counted = [*self._ranks[0].steps, *(group.get("step") for group in self.groups)]
        return next((int(step) for step in counted if step is not None), None)

    def shapes(self) -> dict[str, Shape]:
        """By key: `model/NAME` of every parameter, `KIND/NAME` of the trained ones. The others have no values here: a
        save in which some parameters are frozen is refused, because it lacks moments."""
        trained = {name: place.shape for name, place in self._places.items()}
        states = {f"{kind}/{name}": shape for kind in self._kinds for name, shape in trained.items()}
        return {f"{MODEL}/{name}": shape for name, shape in {**trained, **self._frozen}.items()} | states

    def read(self, key: str) -> torch.Tensor:
        kind, _, name = key.partition("/")
        place = self._places[name]
        rows = ((self._ranks[piece.rank].rows[place.row][kind], piece) for piece in place.pieces)
        return torch.cat([row[piece.start : piece.start + piece.length] for row, piece in rows]).reshape(place.shape)

    def _find_frozen(self) -> dict[str, Shape]:
        """Parameters that are not trained but were saved nevertheless."""
        if self.stage == 3:
            return {name: tuple(shape) for name, shape in (self.model.get("frozen_param_shapes") or {}).items()}
        others = {*self.model.get("buffer_names", ()), *self.model.get("shared_params", {})}
        others |= {name for named in self._shapes for name in named}
        whole = self.model.get("module") or {}
        return {name: tuple(tensor.shape) for name, tensor in whole.items() if name not in others}

    def _find_places(self) -> dict[str, Place]:
        if self.stage == 3:
            return from_partitions(self._shapes, len(self._ranks))
        slices = [
            [
                {name: (address.start, address.numel) for name, address in named.items()}
                for named in rank.content["param_slice_mappings"]
            ]
            for rank in self._ranks
        ]
        return from_slices(slices, {name: shape for named in self._shapes for name, shape in named.items()})

    def _check_ranks(self, partitioned: bool) -> None:
        if len({rank.stage for rank in self._ranks}) > 1 or (self.stage == 3) != partitioned:
            raise CheckpointMismatch(
                f"{self.folder}: has files of different stages of ZeRO, of two saves; delete those of the older one"
            )
        found = min(len(self._ranks), len(self._models)) if partitioned else len(self._ranks)
        said = [self.model["dp_world_size"]]
        for rank in self._ranks:
            count = rank.content["partition_count"]
            said += count if isinstance(count, list) else [count]
        for count in said:
            if count != found:
                raise CheckpointDamaged(
                    f"{self.folder}: was saved by {count} ranks, has files of {found}; copy those of all ranks into it"
                )

    def _check_rows(self) -> None:
        for (rank, row), length in needed(self._places).items():
            held = [len(self._ranks[rank].rows[row][kind]) for kind in (MODEL, *self._kinds)]
            if min(held) < length:
                raise Misplaced(f"has {min(held)} elements in row {row} of rank {rank}, needs {length}")


def load(path: Path) -> Any:
    return pickles.load(path, inert.DEEPSPEED)


def _rank(path: Path) -> Rank:
    with complete(path):
        content = load(path)["optimizer_state_dict"]
        stage = int(content.get("zero_stage", 1))  # the optimizer of bfloat16 with float32 gradients does not record it
        if stage == 3:
            weights, optimizer = content["fp32_flat_groups"], content["optimizer_state_dict"]
        else:
            weights, optimizer = content["single_partition_of_fp32_groups"], content["base_optimizer_state"]
        if isinstance(optimizer, list):
            raise CheckpointMismatch(
                f"{path}: zero_optimization.elastic_checkpoint=true: its states are not read in that form; load it with"
                " DeepSpeed, and save it with false"
            )
        states = [optimizer["state"].get(number, {}) for number in range(len(weights))]
        rows = [
            {MODEL: weight, **{kind: value for kind, value in state.items() if is_row(value)}}
            for weight, state in zip(weights, states, strict=True)
        ]
        return Rank(stage, rows, [state.get("step") for state in states], optimizer["param_groups"], content)


def is_row(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0
