"""The questions that every optimizer answers. Each is one module of this folder; `table` names them.

    problems      what it cannot be combined with, and why: one line each
    groups        which parameters are updated alike: weight decay, and a factor on the learning rate
    build         torch's optimizer over the groups
    instead       the settings of another optimizer, for what it does not update itself
    state         what it keeps of a parameter: {kind: shape and dtype}. Checkpoints, estimates, bounds and preflight
                  read this table; a test holds it against what an update really allocates
    fresh         those tensors before they are filled from a checkpoint
    temporaries   bytes that an update needs for a moment
    average       where the weights to evaluate are not those that are trained: how they are made
    work          FLOPs of one update, where it multiplies matrices, and bytes that ranks exchange for it
    description   what it keeps, as text

No module here imports torch before it is asked to build something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from configs.choices import BYTES, Implementation
from configs.schema import Config
from configs.schema import Optimizer as Settings
from trainer.model.roles import Described
from trainer.plan.views import View

if TYPE_CHECKING:
    import torch

COUNTER = "step"
"""Kind of the tensor in which an optimizer counts its updates. A checkpoint holds one number for all parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A tensor that the optimizer keeps for a parameter.

    host: it is in host memory, wherever the parameter is.
    paged: it is in memory that the parameter's GPU and its host share (`trainer.optim.managed`).
    """

    shape: tuple[int, ...]
    dtype: str
    host: bool = False
    paged: bool = False

    @property
    def nbytes(self) -> int:
        size = BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


State = Mapping[str, Kept]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Parameters that are updated alike.

    name: the learning rate's name in logs.
    factor: multiplier of the step's learning rate.
    settings: further entries of torch's param group.
    """

    name: str
    parameters: tuple[tuple[Described, torch.nn.Parameter], ...]
    weight_decay: float
    factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_torch(self, lr: float) -> dict[str, Any]:
        return {
            "params": [parameter for _, parameter in self.parameters],
            "lr": lr * self.factor,
            "weight_decay": self.weight_decay,
            "group": self.name,
            "lr_factor": self.factor,
            **self.settings,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """One rank's part of a parameter. shape: of its piece; under plain data parallel, of the whole."""

    whole: Described
    shape: tuple[int, ...]

    @property
    def piece(self) -> Described:
        return self.whole.cut(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Number of ranks that share one copy of the parameters, and number of copies."""

    ranks: int = 1
    copies: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """The weights to evaluate and to export: the parameter moved towards its state of this kind by the fraction `part`
    (away from it, if negative)."""

    kind: str
    part: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """flops: of the update of one parameter, on the ranks that share it together. exchanged: bytes that these ranks
    send elsewhere for the computation, and receive back."""

    flops: float = 0.0
    exchanged: float = 0.0


class Optimizer(Protocol):
    """A module of this folder. IMPLEMENTATIONS: those it has; `auto` takes the first. USES: keys of `optimizer` that it
    reads. OPTIONS: the dataclass of `optimizer.options`; None: it has none. ZEROED: whether all its states begin as
    zeros, so that `fresh` also makes those before the first update."""

    @property
    def IMPLEMENTATIONS(self) -> Sequence[Implementation]: ...

    @property
    def USES(self) -> frozenset[str]: ...

    @property
    def OPTIONS(self) -> type | None: ...

    @property
    def ZEROED(self) -> bool: ...

    def problems(self, config: Config, view: View) -> Iterator[str]:
        """view: the plan's dense view of its ranks."""
        ...

    def groups(self, parameters: Sequence[tuple[Described, torch.nn.Parameter]], settings: Settings) -> list[Group]: ...

    def build(self, grouped: Sequence[Group], settings: Settings, *, replicas: Any) -> torch.optim.Optimizer:
        """replicas: the process group of ranks that hold the same plain tensors; None if there is one such rank."""
        ...

    def instead(self, parameter: Described, settings: Settings) -> Settings | None: ...

    def state(self, parameter: Described, settings: Settings, dtype: str) -> State:
        """dtype: the parameter's own."""
        ...

    def fresh(
        self, built: torch.optim.Optimizer, parameter: torch.Tensor, state: State, *, steps: int
    ) -> dict[str, Any]: ...

    def temporaries(self, held: Sequence[Held], settings: Settings, dtype: str, spread: Spread) -> int:
        """held: the parameters of one param group, in its order."""
        ...

    def average(self, settings: Settings) -> Average | None: ...

    def work(self, parameter: Described, settings: Settings) -> Work:
        """Besides reading and writing the parameter, its gradient and its states."""
        ...

    def description(self, settings: Settings) -> str: ...
