"""A universal checkpoint of DeepSpeed (`ds_to_universal`, or an export of this trainer): one folder per parameter.

FOLDER/latest_universal                        the name of the newest one
FOLDER/global_step100/
    zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt    a parameter whole, what the optimizer keeps of it
    zero/optimizer_state.pt                    the optimizer's settings, loss scale, stage
    *_model_states.pt                          names, shapes and counters, as they were in the save
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointDamaged
from trainer.checkpoint.foreign.source import MODEL
from trainer.checkpoint.foreign.zero import is_row, load
from trainer.checkpoint.foreign.zero_files import complete
from trainer.checkpoint.foreign.zero_places import Misplaced, Shape

LATEST = "latest_universal"
OPTIMIZER = "zero/optimizer_state.pt"
WEIGHT = "fp32"


def is_universal(folder: Path) -> bool:
    return (folder / OPTIMIZER).is_file()


class UniversalSave:
    """As `zero.ZeroSave`. ranks: of the save that it was made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = sorted(folder.glob("*_model_states.pt"))
        if not models or not is_universal(folder):
            missing = "*_model_states.pt" if is_universal(folder) else OPTIMIZER
            raise CheckpointDamaged(f"{folder}: expected {missing}, found none; copy the whole folder")
        self.model: Mapping[str, Any] = load(models[0])
        with complete(models[0]):
            named = {name: tuple(shape) for group in self.model["param_shapes"] for name, shape in group.items()}
        with complete(folder / OPTIMIZER):
            self._common = load(folder / OPTIMIZER)
            self.stage, self.scaler = int(self._common.get("zero_stage", 1)), self._common.get("loss_scaler")
            self.groups = list(self._common["param_groups"])
        self._files, self._shapes = {}, {}
        with complete(folder):
            for file in sorted((folder / "zero").glob("*/*.pt")):
                self._add(file, named)
            if missing := sorted(named.keys() - {key.partition("/")[2] for key in self._files}):
                raise Misplaced(f"has no values of {missing[0]} in zero")

    @property
    def ranks(self) -> int:
        return int(self.model.get("dp_world_size") or 0)

    @property
    def updates(self) -> int | None:
        found = next(iter((self.folder / "zero").glob("*/step.pt")), None)
        counted = [load(found) if found is not None else None]
        states = self._common.get("optimizer_state_dict", {}).get("state", {})
        counted += [*(state.get("step") for state in states.values()), *(group.get("step") for group in self.groups)]
        return next((int(step) for step in counted if step is not None), None)

    def shapes(self) -> dict[str, Shape]:
        return dict(self._shapes)

    def read(self, key: str) -> torch.Tensor:
        return _tensor(load(self._files[key])).reshape(self._shapes[key])

    def _add(self, file: Path, named: Mapping[str, Shape]) -> None:
        name, value = file.parent.name, load(file)
        tensor = _tensor(value)
        if not is_row(tensor):
            return
        key = f"{MODEL if file.stem == WEIGHT else file.stem}/{name}"
        # Of stage 3 the files are flat, and the shape is that of the model; of a model that tensor parallel had
        # divided they are whole, and the shapes in the file of the model are those of one rank.
        shape = tuple(tensor.shape) if isinstance(value, dict) else named[name]
        if tensor.numel() != torch.Size(shape).numel():
            raise Misplaced(f"has {tensor.numel()} elements of {name}, whose shape {list(shape)} needs others")
        self._files[key], self._shapes[key] = file, shape


def _tensor(value: Any) -> Any:
    return value["param"] if isinstance(value, dict) else value
