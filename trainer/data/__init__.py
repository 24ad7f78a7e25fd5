"""Text in, batches out. What a step sees is a function of the seed and of one global sample position.

Sample number p of the run is the same tokens under every layout and world size. Step s reads the positions
[s * global_batch_size, (s + 1) * global_batch_size); a data-parallel rank takes its share of them.

This module has the interfaces that the rest of the trainer needs. `build_data` is in `trainer.data.build`, so that they
can be imported without the libraries that read and tokenise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position without loss (torch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch.

    input_ids: [micro_batch_size, seq_len] int64.
    labels: the same shape; labels[b, i] is the token that follows input_ids[b, i] (already shifted), or IGNORED.
    position_ids: the same shape, unless they are 0, 1, 2, ... in each row: for a rank's slice of a longer sequence, and
    if every document has its own positions, from which transformers builds a mask that separates them
    (`data.document_mask`).
    lengths: [micro_batch_size], tokens of each row before its padding, if there may be any.
    numbers: [micro_batch_size], the samples' positions in the run, which seed random numbers that are the same under
    every layout."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    numbers: torch.Tensor | None = None

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in page-locked memory, from which a GPU copies during computation. Called by the loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    @property
    def named(self) -> dict[str, Any]:
        """The tensors by name; None for those that this batch does not have."""
        names = ("input_ids", "labels", "position_ids", "lengths", "numbers")
        return {name: getattr(self, name) for name in names}

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, **{name: None if one is None else change(one) for name, one in self.named.items()})

    def valid_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


class DataSet(Protocol):
    """The data of one run as one data-parallel rank sees it, on the CPU."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the text; saved with the exported model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal if the text and its tokens are equal."""
        ...

    @property
    def length(self) -> int:
        """Steps of the run."""
        ...

    def steps(self, first_step: int = 0, mark: Any = None) -> Iterator[list[Batch]]:
        """For each step from `first_step` on: this rank's `gradient_accumulation_steps` micro-batches. Endless. mark:
        from `mark`, of an earlier start; without one a stream is read from its start."""
        ...

    def mark(self) -> Any:
        """Position of a stream at the last returned step, the same on all ranks, as JSON values; None if a step needs
        no position."""
        ...

    def samples_of(self, positions: range) -> Mapping[str, int]:
        """Number of these positions of the run in each source; empty if there is one source."""
        ...

    @property
    def validation_sets(self) -> Sequence[str]:
        """Names that `validation` accepts."""
        ...

    def validation(self, name: str | None = None) -> Iterator[Batch]:
        """The same `train.eval_samples` sequences each time, divided over the ranks. Every rank gets equally many
        batches; rows with IGNORED labels fill up missing samples."""
        ...

    def beginnings(self, count: int) -> Batch:
        """The first `count` validation samples, or all if there are fewer. The same on every rank."""
        ...

    def describe(self) -> str:
        """One line: origin of the text, number of documents, tokens, samples."""
        ...
