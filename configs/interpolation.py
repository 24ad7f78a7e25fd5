"""Values written as `${...}`: each is resolved on its own, each failure is one line, and the source text is kept.

A text from the environment, such as a key or a password, is used but not recorded: `config.yaml` holds
`${oc.env:NAME}`. The entry point reads the clock once; ranks and restarts, each with its own clock, would otherwise
turn one `${now:...}` into several folder names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationKeyError, OmegaConfBaseException

from configs.schema import Config

CLOCK = re.compile(r"\$\{now:([^}]*)\}")
Path = tuple[str | int, ...]


class FromEnvironment(str):
    """A text that contains an environment value. source: the text as written, which is what is recorded."""

    source: str = ""


def from_environment(text: str, source: str) -> FromEnvironment:
    made = FromEnvironment(text)
    made.source = source
    return made


def settle_clock(arguments: Sequence[str], now: datetime) -> list[str]:
    """The overrides with each `${now:FORMAT}` replaced by the time."""
    return [CLOCK.sub(lambda match: now.strftime(match[1]), word) for word in arguments]


class Resolved:
    """A tree without interpolations.

    values: the tree.
    sources: source texts of values from the environment.
    problems: (key, text, line) for each interpolation that fails; `values` keeps its text.
    others: further values that the tree may refer to."""

    def __init__(self, tree: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        self.sources: dict[Path, str] = {}
        self.problems: list[tuple[str, str, str]] = []
        self._asked = False
        self._whole = {**others, **tree}
        with _watched_environment(self._ask):
            self.values = cast(dict[str, Any], self._walk(dict(tree), ()))

    def _ask(self) -> None:
        self._asked = True

    @cached_property
    def _root(self) -> DictConfig:
        """Resolved without the schema's types, so that one set of rules checks every value. Most trees hold no
        interpolation."""
        return OmegaConf.create(self._whole)

    def _walk(self, raw: Any, path: Path) -> Any:
        if isinstance(raw, dict):
            return {key: self._one(each, (*path, key)) for key, each in raw.items()}
        return [self._one(each, (*path, number)) for number, each in enumerate(raw)]

    def _one(self, raw: Any, path: Path) -> Any:
        if isinstance(raw, (dict, list)):
            return self._walk(raw, path)
        if not (isinstance(raw, str) and "${" in raw):
            return raw
        owner: Any = self._root
        for step in path[:-1]:
            owner = owner[step]
        self._asked = False
        try:
            value = owner[path[-1]]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
            self.problems.append((_dotted(path), raw, why(error, raw)))
            self.sources[path] = raw
            return raw
        if self._asked and isinstance(value, str):
            self.sources[path] = raw
        return value


class _watched_environment:
    """OmegaConf's `oc.env`, with a callback each time it is read, also through a key that another key refers to."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __enter__(self) -> None:
        def env(*arguments: Any) -> str | None:
            self.call()
            return _env(*arguments)

        OmegaConf.register_new_resolver("oc.env", env, replace=True)

    def __exit__(self, *_: object) -> None:
        OmegaConf.register_new_resolver("oc.env", _env, replace=True)


def _env(name: str, *default: Any) -> str | None:
    if name in os.environ:
        return os.environ[name]
    if not default:
        raise NotSet(name)
    return None if default[0] is None else str(default[0])


class NotSet(ValueError):
    """An environment variable without value and default."""


def why(error: BaseException, text: str) -> str:
    """Why an interpolation failed, and the remedy."""
    if isinstance(error, RecursionError):
        return "refers to itself; give a value"
    if "Recursive interpolation" in str(error):
        return "refers to itself; give a value"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, NotSet):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"the environment variable {cause} is not set; set it, or give a default: ${{oc.env:{cause},VALUE}}"
    if isinstance(error, GrammarParseError):
        return "the interpolation cannot be read; write ${section.key} or ${oc.env:NAME}, or \\${ for the characters"
    message = re.sub(r"\s+", " ", str(error)).strip()
    if isinstance(error, InterpolationKeyError):
        named = re.search(r"Interpolation key '(.*?)' not found", message)
        return f"there is no key {named[1] if named else 'of this name'}; write the whole key: ${{section.key}}"
    if "Unsupported interpolation type" in message:
        return "there is no such resolver; use ${oc.env:NAME}, ${now:FORMAT} or ${section.key}"
    return f"cannot be resolved: {message.partition(' full_key:')[0]}"


def remember(config: Config, sources: Mapping[Path, str]) -> None:
    """Mark the texts of a config that come from the environment."""
    for path, source in sources.items():
        owner: Any = config
        for step in path[:-1]:
            owner = getattr(owner, str(step)) if is_dataclass(owner) else owner[step]
        last: Any = path[-1]
        value = getattr(owner, last) if is_dataclass(owner) else owner[last]
        if type(value) is not str:
            continue
        if is_dataclass(owner):
            setattr(owner, last, from_environment(value, source))
        else:
            owner[last] = from_environment(value, source)


def on_record(value: Any) -> Any:
    """A tree of a config in the form that is written down. Environment values are given by their source and other texts
    are escaped, so that resolving the tree again gives the same values."""
    if isinstance(value, dict):
        return {key: on_record(each) for key, each in value.items()}
    if isinstance(value, list):
        return [on_record(each) for each in value]
    if isinstance(value, FromEnvironment):
        return value.source
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", str(value))
    return value


def _dotted(path: Path) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")
