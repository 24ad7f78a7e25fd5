"""Training with the loss computed in slices of a few tokens."""

from __future__ import annotations

from unittest.mock import patch

from tests.support.cases import Trained, train
from tests.support.harness import Overrides, composes
from trainer.model import head

TOKENS = 7


@composes
def train_in_slices(overrides: Overrides) -> Trained:
    """Like `train`, with the loss in slices of a few tokens of a vocabulary of 261."""
    with patch.object(head, "SLICE_ELEMENTS", TOKENS * 261):
        return train(overrides)
