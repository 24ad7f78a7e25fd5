"""`optimizer.options`: keys of a single optimizer, declared as a dataclass in its module. Torch-free.

A field's type is bool, int, float, str, an enum, a tuple of numbers, or one of these or None. Its metadata may
hold a `Range`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
from enum import StrEnum
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from configs.by_path import unknown
from configs.ranges import Range
from configs.schema import Optimizer

KEY = "optimizer.options"
RANGE = "range"
Options = TypeVar("Options")


@dataclass(frozen=True)
class Open:
    """Options that are passed on unchanged; the optimizer's module checks them."""


def read_options(optimizer: Optimizer, declared: type[Options]) -> Options:
    """The options, defaults filled in, after their check."""
    hints = get_type_hints(declared)
    given = {key: _value(hints[key], value) for key, value in optimizer.options.items()}
    return declared(**given)


def check_options(optimizer: Optimizer, declared: type | None) -> Iterator[str]:
    """One line for each option that does not exist, has another type, or is out of its range."""
    if declared is Open:
        return
    known: Mapping[str, Field[Any]] = {item.name: item for item in fields(declared)} if declared is not None else {}
    hints = get_type_hints(declared) if declared is not None else {}
    for key, value in optimizer.options.items():
        if key not in known:
            yield f"{KEY}.{key}={value}: {optimizer.name} {unknown(key, known, key=KEY)}"
            continue
        yield from (f"{KEY}.{key}={value}: {rule}" for rule in _rules(hints[key], value, known[key]))


def _rules(wanted: Any, value: Any, declared: Field[Any]) -> Iterator[str]:
    try:
        found = _value(wanted, value)
    except (TypeError, ValueError):
        yield f"must be {_said(wanted)}"
        return
    allowed: Range | None = declared.metadata.get(RANGE)
    numbers = found if isinstance(found, tuple) else (found,)
    known = [number for number in numbers if number is not None]
    wrong = next((number for number in known if allowed is not None and not allowed.holds(number)), None)
    if allowed is not None and wrong is not None:
        yield f"{'each ' if isinstance(found, tuple) else ''}{allowed.rule(wrong)}"


def _value(wanted: Any, value: Any) -> Any:
    """Raises TypeError or ValueError for a value of another type."""
    if get_origin(wanted) is UnionType:
        return None if value is None else _value(get_args(wanted)[0], value)
    if isinstance(wanted, type) and issubclass(wanted, StrEnum):
        return wanted(str(value))
    if get_origin(wanted) is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(get_args(wanted)):
            raise TypeError
        return tuple(_value(kind, one) for kind, one in zip(get_args(wanted), value, strict=True))
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise TypeError
    return value


def _said(wanted: Any) -> str:
    if isinstance(wanted, type) and issubclass(wanted, StrEnum):
        return f"one of {', '.join(wanted)}"
    if get_origin(wanted) is UnionType:
        return f"{_said(get_args(wanted)[0])} or null"
    if get_origin(wanted) is tuple:
        return f"a list of {len(get_args(wanted))} numbers"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(wanted, "a word")
