"""Import a user's class or function by its path, package.module.Name. A wrong path is reported in one line."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from traceback import extract_tb
from typing import Any

from configs.errors import PlanError

ROOT = Path(__file__).parent.parent
PLACES = [get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
PLACES += [str(ROOT / name) for name in ("configs", "trainer", "launch", "slurm")]
STRANGE = ("<", *(f"{place}{os.sep}" for place in PLACES))
"""Prefixes of file paths that do not belong to the user."""
HIDDEN = "torchao"
"""`trainer` hides this library from transformers, which would import it in every run."""


def reveal_hidden() -> None:
    """Let the hidden library be imported."""
    if sys.modules.get(HIDDEN, sys) is None:
        del sys.modules[HIDDEN]


def find(path: str, given: str, *, kind: str = "class") -> Any:
    """The object at the path. given: key=value for the message. Raises PlanError.

    The module is found like any other: installed, or on PYTHONPATH.
    """
    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise PlanError(f"{given}: is no path of a {kind}; give package.module.{kind.capitalize()}")
    reveal_hidden()  # the user's module may be part of it, or import it
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise PlanError(f"{given}: cannot import {module} ({described(error)}); install it, or mend the path") from None
    if found is None:
        near = get_close_matches(name, dir(import_module(module)), n=1)
        raise PlanError(f"{given}: {module} has no {name}; {f'did you mean {near[0]}?' if near else 'mend the path'}")
    return found


def source_of(path: str) -> str:
    """Source text of the module that a path names, without importing it; empty if it cannot be read."""
    try:
        spec = find_spec(path.rpartition(".")[0])
        return Path(spec.origin).read_text() if spec is not None and spec.origin is not None else ""
    except (ImportError, OSError, ValueError):
        return ""


def misfits(
    found: Callable[..., Any], path: str, options: Mapping[str, Any], *, key: str, own: Mapping[str, str]
) -> Iterator[str]:
    """One line for each unknown option and for each missing argument.

    key: prefix of the options. own: arguments that the trainer supplies, with the key that sets each, if there is one.
    """
    named = arguments(found)
    takes = [name for name, about in named.items() if about.kind not in (about.VAR_KEYWORD, about.VAR_POSITIONAL)]
    open_ended = any(about.kind is about.VAR_KEYWORD for about in named.values())
    free = [name for name in takes if name not in own]
    for name, value in options.items():
        if name in own:
            yield f"{key}.{name}={value}: is no option; {f'give {own[name]}' if own[name] else 'leave it out'}"
        elif name not in takes and not open_ended:
            yield f"{key}.{name}={value}: {path} {unknown(name, free, key=key)}"
    for name in free:
        if named[name].default is named[name].empty and name not in options:
            yield f"{key}.{name}: {path} needs it; give {key}.{name}=..."


def arguments(found: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Parameters of a constructor; none for one written in C without a signature."""
    try:
        return inspect.signature(found).parameters
    except ValueError:
        return {}


def unknown(name: str, known: Iterable[str], *, key: str) -> str:
    """Why the option is refused, and which options exist."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    meant = f"did you mean {key}.{near[0]}? It" if near else "it"
    has = f"has {', '.join(names)}" if names else "has none; leave it out"
    return f"has no such option; {meant} {has}"


def described(error: BaseException) -> str:
    """An error raised by a user's code, and where: `KeyError: 3, at /home/me/rows.py:12 in __getitem__`.

    The place is left out if the error does not come from user code (Python, a library, this project).
    """
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(STRANGE)]
    if not frames:
        return said
    # Report where control enters the user's file; deeper calls into other files are not theirs to fix.
    last = next(frame for frame in reversed(frames) if frame.filename == frames[0].filename)
    return f"{said}, at {last.filename}:{last.lineno} in {last.name}"
