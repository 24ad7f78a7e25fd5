"""Data of any class by its path: `data.target=package.module.Class`, with `data.options` as its arguments. Torch-free.

    numbered    __len__ and __getitem__            shuffled, held out of, resumed by arithmetic
    a stream    __iter__, from its start each time read in order; state_dict and load_state_dict make a resume quick

Of the arguments `tokenizer`, `seq_len`, `vocab_size` and `seed` a class gets those that its constructor names.
docs/python.md defines a sample and the optional methods. Next: `read`, which makes an object and reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from configs.by_path import arguments, find, misfits
from configs.errors import PlanError
from configs.schema import Config
from configs.schema_data import Data

GIVEN = {"tokenizer": "data.tokenizer", "seq_len": "data.seq_len", "vocab_size": "", "seed": "train.seed"}
"""Arguments that come from separate keys, or from the model."""
NUMBERED, STREAM, PLACE = ("__len__", "__getitem__"), ("__iter__",), ("state_dict", "load_state_dict")
VALIDATION = "validation"
ABSTRACT = ("torch.utils.data.dataset", "Dataset.__getitem__")
"""Methods that torch's streams inherit and that raise NotImplementedError."""


def problems(config: Config) -> Iterator[str]:
    """Problems of the class and its arguments, one line each, before an object is made."""
    data, key = config.data, f"data.target={config.data.target}"
    try:
        found = class_of(data)
    except PlanError as error:
        yield from error.problems
        return
    yield from misfits(found, str(data.target), data.options, key="data.options", own=GIVEN)
    place = [name for name in PLACE if callable(getattr(found, name, None))]
    if len(place) == 1:
        yield f"{key}: has {place[0]} alone, and a resumed run needs both {' and '.join(PLACE)}; give both, or none"
    held_apart = "is a stream" if is_stream(data) else "has a validation()" if hasattr(found, VALIDATION) else ""
    if held_apart and data.validation_fraction not in (0, Data().validation_fraction):
        yield (
            f"data.validation_fraction={data.validation_fraction}: {key} {held_apart}, and nothing is held out; leave"
            " it out"
        )
    if is_stream(data) and config.train.eval_samples and not hasattr(found, VALIDATION):
        yield (
            f"{key}: a stream without validation(), so nothing can be held out; give it one, or set"
            " train.eval_samples=0"
        )


def is_stream(data: Data) -> bool:
    """Whether the number of its samples is unknown. False for a path that is not a class: `problems` reports it."""
    try:
        return not _has(class_of(data), NUMBERED)
    except PlanError:
        return False


def class_of(data: Data) -> type:
    """Raises PlanError for a path that is not a class of samples."""
    if data.target is None:
        raise PlanError("data.target=null: data=custom needs it: data.target=package.module.Class; give it")
    key = f"data.target={data.target}"
    found = find(data.target, key)
    if not isinstance(found, type):
        raise PlanError(f"{key}: is no class; give one, whose objects are the data")
    if not (_has(found, NUMBERED) or _has(found, STREAM)):
        raise PlanError(
            f"{key}: has neither __len__ and __getitem__ nor __iter__; give it samples by number or in order"
        )
    return found


def made_with(found: type, config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of its constructor. given: a value for each of GIVEN."""
    named = arguments(found)
    return {**{name: given[name] for name in GIVEN if name in named}, **config.data.options}


def _has(found: type, names: tuple[str, ...]) -> bool:
    return all(callable(each := getattr(found, name, None)) and _place(each) != ABSTRACT for name in names)


def _place(function: Any) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
