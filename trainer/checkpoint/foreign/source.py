"""The interface of a kind of foreign checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from configs.errors import CheckpointMismatch
from trainer.engine.saved import Saved
from trainer.optim.table import keeping

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

MODEL = "model"
"""Kind of the weights, as `Saved` names them: `model/NAME`. The optimizer's kinds are those of `trainer.optim`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A foreign checkpoint's information besides its tensors.

    kind: its name in messages.
    step: number of updates that its trainer counted. optimizer_steps: number that the optimizer made, as bias
    correction counts them. samples: number seen over all ranks; None if unknown.
    optimizer: our name of the optimizer whose states it holds.
    settings: our key -> the source's value.
    next_lr: learning rate of its next update; None if unknown.
    config: of the model; None if it has none.
    loss_scale, good_steps: as in `trainer.engine.Counters`.
    tokenizer: the folder with its tokenizer's files; None if it has none.
    notes: omitted parts, one sentence each, to follow the name of the source.
    adapters: for a checkpoint of LoRA's matrices alone, its settings by our keys; empty if the whole model is trained.
    """

    kind: str
    step: int
    optimizer_steps: int
    samples: int | None = None
    optimizer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    next_lr: float | None = None
    config: PretrainedConfig | None = None
    loss_scale: float | None = None
    good_steps: int | None = None
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()
    adapters: Mapping[str, Any] = field(default_factory=dict)


class Source(Saved, Protocol):
    """The tensors of a foreign checkpoint by our keys (`model/NAME`, `exp_avg/NAME`, ...; NAME is the parameter's name
    in the Hugging Face model of this version of transformers), each read on demand. Weights are the optimizer's own
    copy, if there is one. Every parameter has the same kinds."""

    @property
    def record(self) -> Record: ...


Read = Callable[[], "torch.Tensor"]


class Tensors:
    """A `Source`: each tensor by a function that reads it."""

    def __init__(self, record: Record, reads: Mapping[str, Read], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.record, self._reads, self._shapes = record, reads, shapes

    def __contains__(self, key: str) -> bool:
        return key in self._reads

    def names(self) -> list[str]:
        return list(self._reads)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str) -> torch.Tensor:
        return self._reads[key]()


def alone(folder: Path) -> CheckpointMismatch:
    """For an import of adapters without a run."""
    return CheckpointMismatch(
        f"{folder}: holds adapters alone, of which only a run knows the model beneath; go on with a run: tuning=lora"
        f" train.resume={folder}"
    )


def optimizer_of(kinds: Set[str], *, where: str) -> str:
    """Our name of the optimizer that keeps these kinds of tensors for a parameter. Raises CheckpointMismatch."""
    found = keeping(kinds) if kinds else None
    if found is None:
        raise CheckpointMismatch(
            f"{where}: its optimizer keeps {' and '.join(sorted(kinds)) or 'nothing'} of a parameter, which no"
            " optimizer here does; begin from its weights alone"
        )
    return found


def settings_of(groups: Sequence[Mapping[str, Any]], *, where: str) -> tuple[dict[str, Any], float | None]:
    """The settings in torch's param groups by our keys, and the learning rate of the next update.

    where: the file, for the message. Raises CheckpointMismatch for an update that AdamW here does not make.
    """
    problems = []
    for name in ("amsgrad", "maximize"):
        if any(group.get(name) for group in groups):
            problems.append(f"{where}: was trained with {name}=true, which this trainer's AdamW does not have")
    if any(group.get("decoupled_weight_decay") is False and group.get("weight_decay") for group in groups):
        problems.append(
            f"{where}: adds weight decay to the gradient (Adam), and adamw here subtracts it from the weight; begin"
            " from its weights alone"
        )
    if problems:
        raise CheckpointMismatch(*problems)
    found: dict[str, Any] = {}
    # The group with decay gives its value: norms and biases have a group without decay.
    groups = sorted(groups, key=lambda group: -float(group.get("weight_decay") or 0))
    first = groups[0] if groups else {}
    if (peak := first.get("initial_lr")) is not None:
        found["optimizer.lr"] = float(peak)
    if (betas := first.get("betas")) is not None:
        found["optimizer.beta1"], found["optimizer.beta2"] = map(float, betas)
    for ours, theirs in (("eps", "eps"), ("weight_decay", "weight_decay"), ("beta1", "momentum")):
        if first.get(theirs) is not None:
            found[f"optimizer.{ours}"] = float(first[theirs])
    return found, None if first.get("lr") is None else float(first["lr"])
