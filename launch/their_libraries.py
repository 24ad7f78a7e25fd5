"""Checks whether the installed library of a file's trainer reads the file, by its own class, and prints the answer.

The translation does not depend on it: the file may be for another version than the installed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any, cast

from configs.errors import first_line
from configs.imports.combine import Imported
from configs.imports.fields import Source


def checked(made: Imported) -> Iterator[str]:
    """A line for each file of DeepSpeed or accelerate. Imports these libraries, which takes seconds."""
    for read in made.read:
        # The class of the ZeRO section can be checked without a process group.
        if "deepspeed" in read.source.sections and isinstance(read.source.get("zero_optimization"), Mapping):
            yield _line(read.source, "deepspeed", _deepspeed(read.source))
        elif "accelerate" in read.source.sections:
            yield _line(read.source, "accelerate", _accelerate(read.source))


def _line(source: Source, library: str, problems: list[str]) -> str:
    said = f"refuses {'; '.join(problems)}" if problems else "reads it"
    return f"checked    {source.name}: {library} {version(library)} {said}"


def _deepspeed(source: Source) -> list[str]:
    from trainer.engine.deepspeed.setup import import_deepspeed

    import_deepspeed("cpu")
    its: Any = import_module("deepspeed.runtime.zero.config")
    zero = source.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return []
    try:
        its.DeepSpeedZeroConfig(**_without_auto(cast("Mapping[str, Any]", zero)))
    except Exception as error:  # pydantic's, with one line or more per field, and whatever its own checks raise
        fields: Any = getattr(error, "errors", list[Any])()
        named = [f"zero_optimization.{'.'.join(map(str, each['loc']))} ({each['msg']})" for each in fields]
        return named or [first_line(error)]
    return []


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer fills in "auto" before DeepSpeed sees it."""
    return {
        key: _without_auto(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if value != "auto"
    }


def _accelerate(source: Source) -> list[str]:
    its: Any = import_module("accelerate.commands.config.config_args")
    try:
        its.load_config_from_file(str(source.path))
    except Exception as error:  # of any kind: the class is built from the file's values
        return [first_line(error)]
    return []
