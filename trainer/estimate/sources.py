"""The sources of a trace: the trainer's modules that the tracer's imports reach, and the libraries that they import.

Both are read from the source, so a module that moves or is new is in the key of a kept trace from the first day.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from configs.packages import installed

ROOT = Path(__file__).parents[2]
TRACER = "trainer.estimate.tracing"
OURS = ("trainer", "configs")

_FOR_TYPES = re.compile(r"^( *)if [^\n]*\bTYPE_CHECKING\b[^\n]*:\n(?:\1 +[^\n]*\n|\n)*", re.MULTILINE)
_IMPORT = re.compile(r"^ *(?:from ([\w.]+) import (\([^)]*\)|[^\n]*)|import ([^\n]*))", re.MULTILINE)
_COMMENT = re.compile(r"#[^\n]*")


@cache
def dependencies() -> tuple[str, dict[str, str]]:
    """A digest of the modules' sources, and the version of each library that is installed."""
    sources, libraries = reached(TRACER)
    digest = hashlib.sha256(b"".join(ROOT.joinpath(file).read_bytes() for file in sources)).hexdigest()
    return digest, {name: found for name in libraries if (found := installed(name)) is not None}


def reached(module: str) -> tuple[list[str], list[str]]:
    """Files that importing and running `module` may reach, relative to ROOT, and the libraries they import.

    Imports inside functions count. Those for type checkers alone do not: none of their code runs.
    """
    files: dict[str, str] = {}
    libraries, seen = set[str](), set[str]()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if (file := _file(name)) is None:
            continue
        files[name] = str(file.relative_to(ROOT))
        for imported in _imports(file.read_text()):
            top = imported.partition(".")[0]
            if top in OURS:
                # `from package import name`: the name may be a module, or something in the package.
                waiting += [imported, imported.rpartition(".")[0]]
            elif top not in sys.stdlib_module_names:
                libraries.add(top)
    return sorted(files.values()), sorted(libraries)


def _imports(source: str) -> Iterator[str]:
    """Names of the modules that a source imports. A parser would take ten times as long, at each estimate; a sentence
    that reads like an import names no module."""
    for found in _IMPORT.finditer(_FOR_TYPES.sub("", source)):
        package, names, modules = found.groups()
        for name in _COMMENT.sub("", names or modules).strip("()").split(","):
            if parts := name.split():
                yield f"{package}.{parts[0]}" if package else parts[0]


def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
