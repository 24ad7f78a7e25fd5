"""What a session computes once, though several lanes need it: results on disk, under a lock.

Pytest plugin as well: the session that starts the lanes makes the folder, and hands it to them.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

import pytest
from filelock import FileLock

P = ParamSpec("P")
R = TypeVar("R")
_folder: Path | None = None


def once(function: Callable[P, R]) -> Callable[P, R]:
    """As functools.cache, and shared with the other lanes of the session. Arguments and results: small, picklable."""

    @functools.cache
    def remembered(*args: Any, **given: Any) -> R:
        if _folder is None:  # no test, but a script that uses its helpers
            return function(*args, **given)
        name = f"{function.__module__}.{function.__qualname__}"
        file = _folder / sha256(repr((name, args, sorted(given.items()))).encode()).hexdigest()
        with FileLock(f"{file}.lock"):
            if not file.exists():
                partial = file.with_suffix(".partial")
                partial.write_bytes(pickle.dumps(function(*args, **given)))
                partial.rename(file)
            return pickle.loads(file.read_bytes())

    return functools.wraps(function)(remembered)  # pyright: ignore[reportReturnType]


class Folder:
    """Made by the session, gone with it; its lanes get its name."""

    def __init__(self) -> None:
        self.made = TemporaryDirectory(prefix="cookbook-tests-")
        _use(self.made.name)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["shared"] = self.made.name

    def pytest_unconfigure(self) -> None:
        self.made.cleanup()


def pytest_configure(config: pytest.Config) -> None:
    given: dict[str, Any] | None = getattr(config, "workerinput", None)
    if given is not None:
        _use(given["shared"])
    else:
        config.pluginmanager.register(Folder(), "shared-folder")


def _use(folder: str) -> None:
    global _folder
    _folder = Path(folder)
