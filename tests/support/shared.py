"""Results that several lanes need but a session computes once. They are on disk, under a lock.

This is also a pytest plugin: the session that starts the lanes makes the folder and passes it to them.
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
    """Like functools.cache, but shared by all lanes. Arguments and results must be small and picklable."""

    @functools.cache
    def remembered(*args: Any, **given: Any) -> R:
        if _folder is None:  # no test session: a script uses the helpers
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
    """A temporary folder of the session, whose name its lanes get."""

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
