"""Files of other trainers, and the files that they refer to, as sources with their formats."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from configs.errors import ConfigError
from configs.files import Loader, broken_yaml, read_text
from configs.imports import accelerate, axolotl, deepspeed, llama_factory, torchtitan, training_arguments
from configs.imports.fields import Field, Source
from configs.imports.pickled import read_pickle


class Format(Protocol):
    """Interface of a format's module."""

    NAME: str
    SECTIONS: tuple[str, ...]

    @staticmethod
    def recognise(tree: Mapping[str, Any], /) -> bool: ...

    @staticmethod
    def fields(source: Source, problems: list[str], /) -> Iterator[Field]: ...


# The first module that recognises a file translates it.
FORMATS = cast("tuple[Format, ...]", (accelerate, deepspeed, torchtitan, axolotl, llama_factory, training_arguments))
LARGEST_DEPTH = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """A source and the format that recognised it."""

    source: Source
    format: Format


def read_files(paths: Sequence[str]) -> list[Read]:
    """All files, and those that they refer to. Raises ConfigError with one line for each unreadable file."""
    problems: list[str] = []
    found: list[Read] = []
    for name in dict.fromkeys(paths):
        try:
            found.append(_recognised(name, Path(name), read_tree(Path(name).expanduser())))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    for read in list(found):
        found += _named(read, {each.source.path.resolve() for each in found})
    kinds = [read.format.NAME for read in found]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    if twice is not None:
        names = ", ".join(read.source.name for read in found if twice == read.format.NAME)
        raise ConfigError(f"{names}: several files of {twice}; give one of them")
    together = frozenset(section for read in found for section in read.format.SECTIONS)
    return [replace(read, source=replace(read.source, together=together)) for read in found]


def _recognised(name: str, path: Path, tree: Mapping[str, Any]) -> Read:
    for kind in FORMATS:
        if kind.recognise(tree):
            return Read(source=Source(name=name, path=path, tree=tree, sections=kind.SECTIONS), format=kind)
    known = ", ".join(kind.NAME for kind in FORMATS)
    raise ConfigError(f"{name}: holds {_listed(tree)}, which is none of the formats known here: {known}")


def _listed(tree: Mapping[str, Any]) -> str:
    names = list(tree)
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "no keys"


def _named(read: Read, known: set[Path]) -> Iterator[Read]:
    """The DeepSpeed files that a file refers to, or contains."""
    inline = read.source.get("deepspeed")
    if "training_arguments" in read.format.SECTIONS and isinstance(inline, Mapping) and inline:
        tree = cast("Mapping[str, Any]", inline)
        source = Source(
            name=f"{read.source.name}: deepspeed", path=read.source.path, tree=tree, sections=("deepspeed",)
        )
        yield Read(source=source, format=cast("Format", deepspeed))
        return
    named: Callable[[Source], Iterator[tuple[str, Any]]] | None = getattr(read.format, "files_named", None)
    for _, name in named(read.source) if named is not None else ():
        places = [Path(str(name)).expanduser(), read.source.path.parent / str(name)]
        path = next((place for place in places if place.is_file()), None)
        if path is not None and path.resolve() not in known:
            yield _recognised(str(name), path, read_tree(path))


def read_tree(path: Path) -> dict[str, Any]:
    """The values of a file by its ending: .json, .yaml, .yml, .toml or .bin. Raises ConfigError in one line."""
    if path.suffix in (".bin", ".pt", ".pkl"):
        return read_pickle(path)
    text = read_text(path)
    try:
        if path.suffix == ".toml":
            tree: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            tree = json.loads(text, object_pairs_hook=_once)
        else:
            tree = _yaml(text, str(path))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(broken_yaml(error, str(path))) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = path.suffix.removeprefix(".") or "YAML"
        reason = "is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid {kind.upper()}: {reason}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no keys; give the configuration of a trainer")
    if _depth(tree) > LARGEST_DEPTH:
        raise ConfigError(f"{path}: is nested too deeply for a configuration")
    return cast("dict[str, Any]", tree)


def _yaml(text: str, where: str) -> Any:
    """One document with text keys. Aliases may not refer to themselves, or multiply."""
    if text.count("*") > 1000:
        raise ConfigError(f"{where}: holds too many aliases for a configuration")
    tree = yaml.load(text, Loader=Loader)
    return _texts(tree)


def _texts(tree: Any, depth: int = 0) -> Any:
    if depth > LARGEST_DEPTH:
        raise RecursionError
    if isinstance(tree, dict):
        return {str(key): _texts(value, depth + 1) for key, value in tree.items()}
    return [_texts(value, depth + 1) for value in tree] if isinstance(tree, list) else tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice} stands in it twice")
    return dict(pairs)


def _depth(tree: Any) -> int:
    if isinstance(tree, dict):
        return 1 + max(map(_depth, tree.values()), default=0)
    return 1 + max(map(_depth, tree), default=0) if isinstance(tree, list) else 0
