"""What a trace depends on: the trainer's modules that the tracer's imports reach, and the libraries that they import.

Both are read from the source, so a module that moves or is new is in the key of a kept trace from the first day.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRACER = "trainer.estimate.tracing"
OURS = ("trainer", "configs")


@cache
def dependencies() -> tuple[str, dict[str, str]]:
    """A digest of the modules' sources, and the version of each library that is installed."""
    sources, libraries = reached(TRACER)
    digest = hashlib.sha256(b"".join(ROOT.joinpath(file).read_bytes() for file in sources)).hexdigest()
    return digest, {name: found for name in libraries if (found := _version(name)) is not None}


def reached(module: str) -> tuple[list[str], list[str]]:
    """Files that importing and running `module` may reach, relative to ROOT, and the libraries they import.

    Imports inside functions count. Those for type checkers alone do not: nothing of them runs.
    """
    files: dict[str, str] = {}
    libraries: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _file(name)
        if name in files or file is None:
            continue
        files[name] = str(file.relative_to(ROOT))
        for imported in _imports(ast.parse(file.read_text())):
            top = imported.partition(".")[0]
            if top in OURS:
                # `from package import name`: the name may be a module, or something in the package.
                waiting += [imported, imported.rpartition(".")[0]]
            elif top not in sys.stdlib_module_names:
                libraries.add(top)
    return sorted(files.values()), sorted(libraries)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imports(node)


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
