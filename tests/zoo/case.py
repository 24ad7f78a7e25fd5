"""What a rank of `python -m tests.zoo` does."""

from __future__ import annotations

import warnings

from configs.errors import CookbookError
from tests.support.cases import Trained, train


def attempt(overrides: list[str]) -> Trained | str:
    """What was trained, or the line of a refusal."""
    warnings.simplefilter("ignore")
    try:
        return train(overrides)
    except CookbookError as error:
        return " ".join(error.problems)
