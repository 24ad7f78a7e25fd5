"""The files of one save by DeepSpeed's ZeRO, by their names.

FOLDER/latest                                          the name of the newest save
FOLDER/global_step100/                                 (`checkpoint-100/global_step100` of transformers' Trainer)
    mp_rank_00_model_states.pt                         stages 1, 2: names, shapes, counters, the model in its dtype
    zero_pp_rank_R_mp_rank_00_model_states.pt          stage 3: the same of each rank
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   rows of master weights and optimizer states of each rank
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.errors import CheckpointDamaged, CheckpointMismatch
from trainer.checkpoint.foreign.zero_places import Misplaced

LATEST = "latest"
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OTHERS = {
    "expp_rank_": "experts divided over ranks, by DeepSpeed-MoE",
    "layer_": "the layers of a pipeline, or experts of DeepSpeed-MoE",
}
_CONVERT = (
    "convert it first: python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state, and give its output"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """model, optimizer: by rank; stages 1 and 2 have one model file. partitioned: whether each rank has its own."""

    folder: Path
    model: tuple[Path, ...]
    optimizer: tuple[Path, ...]
    partitioned: bool


def save_folder(folder: Path, pointer: str = LATEST) -> Path | None:
    """The newest save below a folder, as its file `latest` names it; None without one."""
    try:
        named = folder / (folder / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return named if named.parent == folder else None


def is_save(folder: Path) -> bool:
    return folder.is_dir() and any(_OPTIMIZER.fullmatch(path.name) for path in folder.iterdir())


def find_files(folder: Path) -> Files:
    """Raises CheckpointMismatch for a layout that is not read, CheckpointDamaged for missing files."""
    if not folder.is_dir():
        raise CheckpointDamaged(f"{folder}: expected the save that {LATEST} names, found none; copy the whole folder")
    names = sorted(path.name for path in folder.iterdir())
    for beginning, what in _OTHERS.items():
        if any(name.startswith(beginning) for name in names):
            raise CheckpointMismatch(f"{folder}: has {what}; {_CONVERT}")
    if "offloaded_tensors" in names:
        raise CheckpointMismatch(
            f"{folder}: has optimizer states of NVMe in files of their own (offloaded_tensors), which are not read;"
            " load it with DeepSpeed and offload_optimizer.device=cpu, and save it again"
        )
    optimizer, model = _by_rank(folder, names, _OPTIMIZER), _by_rank(folder, names, _MODEL)
    if not optimizer:
        raise CheckpointMismatch(
            f"{folder}: has no *_optim_states.pt, so it is no save of ZeRO 1, 2 or 3; give its weights alone as"
            " model.path=HF_FOLDER model.weights=pretrained"
        )
    if not model:
        raise CheckpointDamaged(f"{folder}: expected *_model_states.pt, found none; copy the whole folder")
    partitioned = next(iter(model.values())).name.startswith("zero_pp_rank_")
    return Files(folder=folder, model=_all(model), optimizer=_all(optimizer), partitioned=partitioned)


def _by_rank(folder: Path, names: Sequence[str], pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for name in names:
        if (match := pattern.fullmatch(name)) is None:
            continue
        if int(match[2]) > 0:
            raise CheckpointMismatch(
                f"{folder}: {name} is of a model divided by tensor or pipeline parallel; {_CONVERT}"
            )
        rank = int(match[1] or 0)
        if rank in found:
            raise CheckpointMismatch(
                f"{folder}: has {found[rank].name} and {name}, of two saves; delete those of the older one"
            )
        found[rank] = folder / name
    return found


def _all(found: Mapping[int, Path]) -> tuple[Path, ...]:
    last = max(found)
    for rank in range(last):
        if rank not in found:
            name = re.sub(r"(zero_pp_rank_)\d+", rf"\g<1>{rank}", found[last].name)
            raise CheckpointDamaged(
                f"{found[last].with_name(name)}: expected a file of rank {rank}, found none; copy the whole folder"
            )
    return tuple(found[rank] for rank in range(last + 1))


@contextmanager
def complete(path: Path) -> Iterator[None]:
    """Raise CheckpointDamaged, in one line, where a file or folder lacks something that every save has."""
    try:
        yield
    except Misplaced as error:
        raise CheckpointDamaged(f"{path}: {error}; copy all files of one save") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointDamaged(
            f"{path}: expected what DeepSpeed 0.14 or newer saves, found {error!r}; load it with DeepSpeed and save it"
            " again"
        ) from None
