"""A class or function of the user's own, by its path: package.module.Name. What is wrong with the path is one line."""

from __future__ import annotations

import inspect
import os
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
"""Beginnings of the paths of files that are not a user's."""


def find(path: str, given: str, *, kind: str = "class") -> Any:
    """What stands there. given: key=value of the message. Raises PlanError.

    A module is found where Python finds any: installed, or by PYTHONPATH.
    """
    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise PlanError(f"{given}: is no path of a {kind}; give package.module.{kind.capitalize()}")
    try:
        found = getattr(import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise PlanError(f"{given}: cannot import {module} ({told(error)}); install it, or mend the path") from None
    if found is None:
        near = get_close_matches(name, dir(import_module(module)), n=1)
        raise PlanError(f"{given}: {module} has no {name}; {f'did you mean {near[0]}?' if near else 'mend the path'}")
    return found


def source_of(path: str) -> str:
    """The text of the module that a path leads into, without an import of it; empty where there is none to read."""
    try:
        spec = find_spec(path.rpartition(".")[0])
        return Path(spec.origin).read_text() if spec is not None and spec.origin is not None else ""
    except (ImportError, OSError, ValueError):
        return ""


def misfits(
    found: Callable[..., Any], path: str, options: Mapping[str, Any], *, key: str, own: Mapping[str, str]
) -> Iterator[str]:
    """One line for each option that it does not take, and for each argument that it misses.

    key: of the options. own: arguments that come from elsewhere, and the key that gives them, if one does.
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
    """What a constructor takes; nothing where it is written in C and does not say it."""
    try:
        return inspect.signature(found).parameters
    except ValueError:
        return {}


def unknown(name: str, known: Iterable[str], *, key: str) -> str:
    """What is wrong with an option of this name, and which there are."""
    names = list(known)
    near = get_close_matches(name, names, n=1)
    meant = f"did you mean {key}.{near[0]}? It" if near else "it"
    has = f"has {', '.join(names)}" if names else "has none; leave it out"
    return f"has no such option; {meant} {has}"


def told(error: BaseException) -> str:
    """What code of the user's own raises, and where in it: `KeyError: 3, at /home/me/rows.py:12 in __getitem__`.

    Without a place where the error is not from such code: of Python, of a library or of this project.
    """
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(STRANGE)]
    if not frames:
        return said
    # Where it enters their file it may call further into it; what they call elsewhere is not theirs to mend.
    last = next(frame for frame in reversed(frames) if frame.filename == frames[0].filename)
    return f"{said}, at {last.filename}:{last.lineno} in {last.name}"
