"""Trackers of experiments by name, and what is wrong with their options. Torch-free; `report.trackers` starts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema import Logging

NO_TRACKER = "none"
TRACKERS = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
SECRET = re.compile(r"(^|[._])(api_?key|token|secret|password)$", re.IGNORECASE)


def check_tracker(logging: Logging) -> Iterator[str]:
    """What is wrong with the tracker's name and options, one line each."""
    if logging.tracker not in (NO_TRACKER, *TRACKERS):
        yield f"logging.tracker={logging.tracker}: not a known tracker; use none, {', '.join(TRACKERS)}"
    if logging.run_name is not None and _leaves(logging.run_name):
        yield (
            f"logging.run_name={logging.run_name}: trackers name a folder after it, which must lie in the run folder;"
            " leave out .. and a leading /"
        )
    for option, _ in flat(logging.options):
        if SECRET.search(option):
            # The value stays out of the message: messages are logged.
            yield (
                f"logging.options.{option}: a key does not belong in a configuration, which is saved with the run;"
                " let the tracker find it in its own login file or environment variable"
            )


def _leaves(name: str) -> bool:
    """Whether a folder of this name would lie outside of the one in which it is made."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or not parts[0] or parts[0].startswith("~") or parts[0].endswith(":") or "\0" in name


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """`a.b.c` and its value, as hyperparameter tables want them: numbers, text; lists as text; null left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float | bool) else str(value)
