"""Text in, batches out. What a step sees is a function of the seed and of one global sample position.

Sample number p of the run is the same tokens under every layout and world size. Step s reads the positions
[s * global_batch_size, (s + 1) * global_batch_size); a data-parallel rank takes its share of them.

Here stands what the rest of the trainer needs to know. `build_data` is in `trainer.data.build`, so that the
contract can be imported without the libraries that read and tokenise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that takes no part in the loss (torch's default `ignore_index`)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids: [micro_batch_size, seq_len] int64. labels: the same shape; labels[b, i] is the token that follows
    input_ids[b, i] (already shifted), or IGNORED. position_ids: the same shape, where they are not 0, 1, 2, ... in each
    row: of a rank's slice of a longer sequence, and where every document has positions of its own, from which
    transformers builds a mask that keeps them apart (`data.document_mask`). lengths: [micro_batch_size], the tokens of
    each row before its padding, where there may be any."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which a GPU copies while it computes. Called by the loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        positions, lengths = (None if one is None else change(one) for one in (self.position_ids, self.lengths))
        return Batch(change(self.input_ids), change(self.labels), positions, lengths)

    def valid_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


class DataSet(Protocol):
    """The data of one run as one data-parallel rank sees it, on the CPU."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What turned the text into tokens; saved with the exported model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal where the text and its tokens are equal."""
        ...

    def steps(self, first_step: int = 0) -> Iterator[list[Batch]]:
        """For each step from `first_step` on: this rank's `gradient_accumulation_steps` micro-batches. Endless."""
        ...

    def validation(self) -> Iterator[Batch]:
        """The same `train.eval_samples` sequences each time, divided over the ranks. Every rank gets equally many
        batches: where samples run out, rows are filled up with IGNORED labels."""
        ...

    def describe(self) -> str:
        """One line: where the text is from, documents, tokens, samples."""
        ...
