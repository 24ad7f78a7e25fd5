"""The import of transformers without what costs seconds and serves no language model.

    the folder of its models    read at two imports, under two spellings of its path: 3,000 files    read once
    scipy                       imported for the losses of models that detect objects                left out

A later import of transformers, by any of its names, finds it imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

SCAN = "create_import_structure_from_path"
"""Of transformers.utils.import_utils: reads which names a folder's modules export. Remembers what it was asked for."""
MODULES = ("trainer", "launch")
COMMANDS = ("cookbook", "memory-estimate")


def import_transformers() -> None:
    """Import what the code of every language model needs."""
    if "transformers.modeling_utils" in sys.modules:
        return
    with _hidden("scipy") if _own_process() else nullcontext():
        from transformers.utils import import_utils

        with _scanned_once(import_utils):
            import transformers.models
        import transformers.modeling_utils  # noqa: F401


def _own_process() -> bool:
    """Whether this process runs an entry point of this project, and not a program that imports it."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return spec.name.split(".")[0] in MODULES
    command = Path(getattr(main, "__file__", None) or "")
    return command.name in COMMANDS and command.parent == Path(sys.executable).parent


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """An optional library seems not to be installed, unless it has been imported already."""
    modules: dict[str, Any] = sys.modules
    if name in modules:
        yield
        return
    modules[name] = None
    try:
        yield
    finally:
        del modules[name]


@contextmanager
def _scanned_once(import_utils: Any) -> Iterator[None]:
    """The folder of models is read once. A version of transformers without the function imports as it does."""
    scan = getattr(import_utils, SCAN, None)
    if scan is None:
        yield
        return
    setattr(import_utils, SCAN, _once(scan))
    try:
        yield
    finally:
        setattr(import_utils, SCAN, scan)


def _once(scan: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The scan, asked for the folder of models as the first import has asked."""
    import transformers

    folder = Path(str(transformers.__file__)).parent / "models"
    return lambda path: scan(folder if Path(path) == folder / "__init__.py" else path)
