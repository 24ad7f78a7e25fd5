"""What the loop sees of an engine: `Engine` alone, and what it says of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from trainer.data import Batch
    from trainer.engine.saved import Saved
    from trainer.model.objective import Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Result of one `step`.

    grad_norm: global L2 norm before clipping, over all parameters and ranks (may be inf or nan).
    updated: False if the update was skipped.
    loss_scale: the fp16 scale of this step's gradient; None without scaling.
    learning_rates: of each group of parameters, if they differ.
    experts: load of routed experts, from `trainer.moe.balancing`."""

    grad_norm: float
    updated: bool
    loss_scale: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """loss: mean cross-entropy over the step's valid tokens, over all ranks. report: None if the loss was not finite
    and the step was therefore dropped."""

    loss: float
    valid_tokens: int
    report: StepReport | None

    @property
    def overflowed(self) -> bool:
        """A float16 gradient beyond its range: expected, because the loss scale handles it."""
        return self.report is not None and not self.report.updated and self.report.loss_scale is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """The numbers of an engine's state. optimizer_steps: number of updates, as bias correction counts them. loss_scale,
    good_steps: of `precision.LossScale`; None without one."""

    optimizer_steps: int
    loss_scale: float | None = None
    good_steps: int | None = None


class Engine(Protocol):
    """One optimizer step over a model that is spread over ranks in any layout.

    model: the Hugging Face module, for its config and names; its parameters may be partitioned.
    objective: used by every forward; it picks the logits as this rank holds them.
    kinds: tensors that the optimizer keeps for each trained parameter, on any rank, under the names of `state`.
    """

    model: PreTrainedModel
    objective: Objective
    kinds: dict[str, frozenset[str]]

    def forward_backward(self, micro_batches: Sequence[Batch], valid_tokens: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of this rank's micro-batches.

        The loss is the sum of the cross-entropy over valid tokens, divided by `valid_tokens` (a scalar on the device):
        their number in the whole step, over all micro-batches and data-parallel ranks. It is never a mean of means,
        which would weight tokens differently in each layout. `trainer.moe` may add terms. Returns this rank's share of
        that loss (a float32 or float64 scalar on the device, detached); the sum over all ranks is the loss of the step.
        """
        ...

    def step(self, lr: float) -> StepReport:
        """Clip by the global norm, update the parameters with this learning rate, clear the gradients.

        A gradient that is not finite is never applied: the report then has `updated=False`.
        """
        ...

    def discard(self) -> None:
        """Drop the accumulated gradient without an update (the loss was not finite)."""
        ...

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropy over the valid tokens of this rank's batch, no gradient. Every rank must call it."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """While it is open, parameters have their evaluation values: an optimizer may average them. No step
        meanwhile."""
        ...

    def parameters(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter, with its evaluation value, under its Hugging Face name, whole, in the master dtype: on rank
        0 a CPU tensor, elsewhere None. One at a time, so no rank holds the whole model. A collective: every rank must
        exhaust it. Tied weights come once, under the name of the input embedding; with adapters on a frozen model only
        the adapters."""
        ...

    def state(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Parameters and optimizer states, whole, in the master dtype: `model/NAME`, then `exp_avg/NAME` and the like,
        NAME as in `parameters`. One at a time, on the one rank that writes it; elsewhere None. The next step may change
        the tensors. A collective: every rank must exhaust it, although ranks may see different keys."""
        ...

    def counters(self) -> Counters: ...

    def load_state(self, saved: Saved, counters: Counters) -> None:
        """Load the output of `state` and `counters`, from whatever layout. Every rank reads its own part. A collective,
        before the first step."""
        ...

    def close(self) -> None:
        """Release resources outside the process (swap files)."""
        ...
