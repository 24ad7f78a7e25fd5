"""Names of experiment trackers, and problems of their options. Torch-free; `report.trackers` starts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from configs.by_path import find, misfits
from configs.errors import PlanError
from configs.schema import Logging

NO_TRACKER = "none"
CUSTOM = "custom"
GIVEN = {
    **{"project": "logging.project", "run_name": "logging.run_name", "folder": "train.run_dir"},
    **{"config": "", "after_step": ""},
}
"""Arguments that a user's own class gets if its constructor names them, with the keys that give them."""
METHODS = ("log", "finish")
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
    """Problems of the tracker's name and options, one line each."""
    if logging.tracker == CUSTOM:
        yield from _check_custom(logging)
    elif logging.tracker not in (NO_TRACKER, *TRACKERS):
        yield f"logging.tracker={logging.tracker}: not a known tracker; use none, {', '.join(TRACKERS)}, {CUSTOM}"
    if logging.target is not None and logging.tracker != CUSTOM:
        yield (
            f"logging.target={logging.target}: is for logging.tracker=custom, this is {logging.tracker}; set that, or"
            " leave it out"
        )
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


def custom_tracker(logging: Logging) -> type:
    """The user's own class. Raises PlanError for a path that is not a class."""
    if logging.target is None:
        raise PlanError("logging.target=null: logging.tracker=custom needs it: logging.target=package.module.Class")
    found = find(logging.target, f"logging.target={logging.target}")
    if not isinstance(found, type):
        raise PlanError(f"logging.target={logging.target}: is no class; give one")
    return found


def _check_custom(logging: Logging) -> Iterator[str]:
    try:
        found = custom_tracker(logging)
    except PlanError as error:
        yield from error.problems
        return
    missing = [f"{name}()" for name in METHODS if not callable(getattr(found, name, None))]
    if missing:
        yield f"logging.target={logging.target}: has no {' and no '.join(missing)}; a tracker has both"
    shown = {name: value for name, value in logging.options.items() if not SECRET.search(name)}
    yield from misfits(found, str(logging.target), shown, key="logging.options", own=GIVEN)


def _leaves(name: str) -> bool:
    """Whether a folder of this name would lie outside its parent."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or not parts[0] or parts[0].startswith("~") or parts[0].endswith(":") or "\0" in name


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """`a.b.c` and its value, in the form of hyperparameter tables: numbers, text; lists as text; null omitted."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str | int | float | bool) else str(value)
