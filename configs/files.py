"""A user's YAML files, read so that every value stays as typed and every problem is one line with the file.

YAML 1.1 reads 12:00:00 as 43200, 0123 as 83, 1e5 as a number and `on` as true. Here a text key keeps its characters.
Other keys accept YAML 1.2 values; a line that the two versions read differently is refused. Hydra reads a user's
folder through `UserFolder`. Files of this package contain nothing that needs this care.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, cast, get_args, get_origin

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError
from configs.interpolation import CLOCK, why
from configs.keys import broken_rule, is_open, is_section, plain_kind, schema_keys
from configs.overrides import unknown_key

SCHEME = "userfolder"
LARGEST_FILE = 2**20
MOST_VALUES = 50_000
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool", "tag:yaml.org,2002:str")
NULL = "tag:yaml.org,2002:null"
# Values that YAML 1.1 reads as a number or a bool and YAML 1.2 as a text.
AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|(?i:y|yes|n|no|on|off)")


class Loader(yaml.SafeLoader):
    """Values of YAML 1.2, with 1e-4 as a number."""


Loader.yaml_implicit_resolvers = {}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
Loader.add_implicit_resolver(NULL, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


class UserFolder(FileConfigSource):
    """Hydra's folder of options, whose files `read_file` reads."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def is_config(self, config_path: str) -> bool:
        # Also for files that cannot be read: `load_config` reports why.
        path = Path(self.path) / self._normalize_file_name(config_path)
        return os.path.lexists(path) and not path.is_dir()

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        text = read_text(path)
        try:
            header = ConfigSource._get_header_dict(text[:512])
        except ValueError as error:
            raise ConfigError(f"{path}: {error}; the first line may be `# @package _global_`") from None
        group = config_path.rpartition("/")[0]
        tree = read_tree(text, where=str(path), package=_package(header.get("package"), group))
        return ConfigResult(
            config=OmegaConf.create(tree), path=f"{SCHEME}://{self.path}", provider=self.provider, header=header
        )


def register() -> None:
    """Register the source with Hydra. May be called again."""
    Plugins.instance().register(UserFolder)


def read_text(path: Path) -> str:
    """Raises ConfigError if the file cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: is not a regular file; give a YAML file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a YAML file that can") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {LARGEST_FILE:,} bytes; a configuration is not")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8; save the file in this encoding") from None


def read_tree(text: str, *, where: str, package: str) -> dict[str, Any]:
    """The values of a YAML text. where: its name in messages. package: prefix of its keys, or "".

    Raises ConfigError with every problem.
    """
    loader = Loader(text) if _is_printable(text, where) else None
    assert loader is not None
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{where}: holds no keys; write lines of `key: value`")
        _check_size(node, where)
        reader = _Reader(loader, where)
        tree = reader.file(node, package)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(broken_yaml(error, where)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{where}: not valid YAML: {reason}") from None
    if reader.problems:
        raise ConfigError(*reader.problems)
    return tree


def broken_yaml(error: yaml.MarkedYAMLError, where: str = "YAML") -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{where}, line {mark.line + 1}" if mark else where
    return f"{place}: not valid YAML: {error.problem or error.context}"


def _is_printable(text: str, where: str) -> bool:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found is not None:
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(f"{where}, line {line}: not valid YAML: a character {found[0]!r}, which YAML does not allow")
    return True


def _package(header: str | None, group: str) -> str:
    name = "_group_" if header is None else header
    return ".".join(part for part in name.replace("_group_", group.replace("/", ".")).split(".") if part != "_global_")


def _check_size(root: yaml.Node, where: str) -> None:
    """Aliases may refer to themselves, or multiply: ten lines can expand to a billion values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise ConfigError(f"{where}, line {node.start_mark.line + 1}: an alias refers to itself; write the values")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children = _children(node)
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise ConfigError(f"{where}: its aliases expand to more than {MOST_VALUES:,} values; write the values")


def _children(node: yaml.Node) -> Sequence[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


class _Reader:
    """Converts YAML nodes to values, each by the type of its key."""

    def __init__(self, loader: Loader, where: str) -> None:
        self.loader, self.where = loader, where
        self.problems: list[str] = []
        self.flat: set[int] = set()

    def file(self, node: yaml.MappingNode, package: str) -> dict[str, Any]:
        if package and not (is_section(package) or package in schema_keys() or is_open(package)):
            self.problems.append(
                f"{self.where}: its first line must be `# @package _global_`, since there is no section {package}: the"
                " keys in it are then those of the whole configuration"
            )
            return {}
        tree: dict[str, Any] = {}
        for name, value in self.pairs(node):
            if name == "defaults":
                tree[name] = self.defaults(value)
            elif is_open(package) and package:
                tree[name] = self.free(value, f"{package}.{name}")
            else:
                self.into(tree, name, value, f"{package}.{name}" if package else name)
        return tree

    def pairs(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
        # An alias can revisit a mapping whose merged keys are already its own.
        seen: set[str] = set()
        for key, _ in node.value if id(node) not in self.flat else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            seen.add(key.value)
        self.loader.flatten_mapping(node)
        self.flat.add(id(node))
        return [(key.value, value) for key, value in node.value]

    def into(self, tree: dict[str, Any], name: str, node: yaml.Node, key: str) -> None:
        if key in schema_keys():
            found = len(self.problems)
            value = self.value(node, key)
            if len(self.problems) == found:
                tree[name] = value
        elif is_section(key):
            if isinstance(node, yaml.MappingNode):
                inner = tree[name] = {}
                for below, value in self.pairs(node):
                    self.into(inner, below, value, f"{key}.{below}")
            elif node.tag != NULL:  # a section whose lines are all comments is null
                self.problem(node, key, unknown_key(key, {}))
        else:
            self.problem(None, key, unknown_key(key, {}))

    def value(self, node: yaml.Node, key: str) -> Any:
        kind = plain_kind(key)
        if isinstance(node, yaml.MappingNode) and get_origin(kind) is dict and get_args(kind)[1] is Any:
            return self.free(node, key)
        if isinstance(node, yaml.MappingNode) and get_origin(kind) is dict:
            value = {name: self.scalar(each, get_args(kind)[1], key) for name, each in self.pairs(node)}
        elif isinstance(node, yaml.SequenceNode) and get_origin(kind) is list:
            value = [self.scalar(each, get_args(kind)[0], key) for each in node.value]
        else:
            value = self.scalar(node, kind, key)
        problem = broken_rule(key, value)
        if problem:
            self.problem(node, key, problem)
        return value

    def scalar(self, node: yaml.Node, kind: Any, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self.free(node, key)
        is_text = isinstance(kind, type) and issubclass(kind, (str, StrEnum))
        if is_text and (node.tag in NUMBERS or (node.tag == NULL and node.style is not None)):
            return self.text(node, key)
        value = self.loader.construct_object(node)
        return self.text(node, key) if isinstance(value, str) else value

    def free(self, node: yaml.Node, key: str) -> Any:
        """A value whose type the schema leaves open."""
        if isinstance(node, yaml.MappingNode):
            return {name: self.free(value, f"{key}.{name}") for name, value in self.pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.free(value, key) for value in node.value]
        node = cast(yaml.ScalarNode, node)
        if node.style is None and AMBIGUOUS.fullmatch(node.value):
            self.problem(
                node,
                key,
                "versions of YAML read this differently; put quotes around a text, or write true, false or a"
                " plain number",
            )
        value = self.loader.construct_object(node)
        return self.text(node, key) if isinstance(value, str) else value

    def text(self, node: yaml.ScalarNode, key: str) -> str:
        if "${" in node.value:
            if CLOCK.search(node.value):
                self.problem(node, key, "each rank would read its own clock; give this key as an override")
            try:
                OmegaConf.create({"value": node.value})
            except OmegaConfBaseException as error:
                self.problem(node, key, why(error, node.value))
        return node.value

    def defaults(self, node: yaml.Node) -> Any:
        value = self.loader.construct_object(node, deep=True)
        entries = value if isinstance(value, list) else [None]
        if not all(_is_default(entry) for entry in entries):
            self.problem(None, "defaults", "must be a list of names and of `override /group: option`")
            return []
        return value

    def problem(self, node: yaml.Node | None, key: str, rule: str) -> None:
        value = f"={node.value}" if isinstance(node, yaml.ScalarNode) else ""
        self.problems.append(f"{self.where}: {key}{value}: {rule}")


def _is_default(entry: Any) -> bool:
    if isinstance(entry, str):
        return bool(entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((group, option),) = cast(dict[Any, Any], entry).items()
    return isinstance(group, str) and (option is None or isinstance(option, str))
