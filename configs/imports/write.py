"""The experiment file of an import, and the lists that a person reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from configs.foreign import Fate
from configs.imports.combine import Imported
from configs.imports.fields import Field, printable, show
from configs.load import composed_options, group_options, load_config, usual
from configs.schema import Config

NAME = "imported"
LABEL = "preset"  # label of a group's option, which carries no information by itself


def experiment(made: Imported, command: str) -> str:
    """The text of an experiment file. command: how it is run, for its head."""
    options, tree = _options(made)
    sources = ", ".join(f"{read.source.name} ({read.format.NAME})" for read in made.read)
    lines = ["# @package _global_", f"# Imported from {sources}.", f"#   {command}"]
    lost = [each for each in made.fields if each.fate in (Fate.lost, Fate.unknown)]
    if lost:
        lines += ["# Without a counterpart here:", *(f"#   {_name(each)}: {each.why}" for each in lost)]
    lines = [printable(line) for line in lines]
    if options:
        lines += ["defaults:", *(f"  - override /{group}: {option}" for group, option in options.items())]
    body = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000) if tree else ""
    return "\n".join([*lines, "", body]).rstrip() + "\n"


def as_config(made: Imported) -> Config:
    """The configuration of an import, without leaving a file behind. Raises ConfigError."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "experiment" / f"{NAME}.yaml"
        file.parent.mkdir()
        file.write_text(experiment(made, ""), encoding="utf-8")
        return load_config([f"experiment={NAME}"], config_dir=folder)


def _options(made: Imported) -> tuple[dict[str, str], dict[str, Any]]:
    """The closest option of each group, and the remaining keys."""
    config, defaults = usual()
    groups = group_options()
    settings = {key: value for key, value in made.settings.items()}
    options: dict[str, str] = {}
    tree: dict[str, Any] = {}
    for group in groups:
        own = {key: value for key, value in settings.items() if key.startswith(f"{group}.")}
        if group in ("experiment",):
            continue
        if group in made.options or group in settings:
            options[group] = made.options.get(group) or settings[group]
            chosen = options[group]
        elif own and group not in ("model", "cluster"):
            chosen, own = _closest(group, own, defaults[group])
            if chosen != defaults[group]:
                options[group] = chosen
        else:
            chosen = defaults[group]
        ready = composed_options(group).get(chosen, getattr(config, group))
        for key, value in own.items():
            if _at(ready, key.removeprefix(f"{group}.")) != value:
                _put(tree, key, value)
    for key, value in settings.items():
        if key.partition(".")[0] not in groups and _at(config, key) != value:
            _put(tree, key, value)
    return options, tree


def _closest(group: str, own: dict[str, Any], default: str) -> tuple[str, dict[str, Any]]:
    """The option with the fewest keys that differ from the wanted ones (the default in a tie), and these keys."""
    ready = composed_options(group)
    before = _flat(asdict(ready[default]))
    wanted = {**before, **{key.removeprefix(f"{group}."): value for key, value in own.items()}}

    def apart(option: str) -> tuple[bool, int, int, int, bool, str]:
        has = _flat(asdict(ready[option]))
        # People name the layout by ZeRO's stage.
        other_stage = has.get("zero_stage") != wanted.get("zero_stage")
        keys = [key for key in wanted if key != LABEL]
        # Keys with named choices characterise an option; numbers only tune it.
        choices = sum(isinstance(wanted[key], str) and has.get(key) != wanted[key] for key in keys)
        # In a tie, prefer the option that chooses the same keys.
        common = sum(has.get(key) != before.get(key) and wanted[key] != before.get(key) for key in keys)
        apart = sum(has.get(key) != wanted[key] for key in keys)
        return other_stage, choices, apart, -common, option != default, option

    chosen = min(ready, key=apart)
    has = _flat(asdict(ready[chosen]))
    return chosen, {f"{group}.{key}": value for key, value in wanted.items() if key != LABEL and has.get(key) != value}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _at(section: Any, key: str) -> Any:
    for name in key.split("."):
        section = getattr(section, name)
    return section


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = str(value) if isinstance(value, str) else value


def assumptions(made: Imported) -> str:
    """Assumptions of an estimate that no file confirms, and fields that it could not follow."""
    lost = [each for each in made.fields if each.fate in (Fate.lost, Fate.unknown)]
    lines = [f"assumed    {line}" for line in made.assumed]
    lines += [f"not followed   {_name(each)}: {each.why}" for each in lost]
    return "\n".join(lines) or "assumed    nothing: the files say what the memory depends on"


def report(made: Imported) -> str:
    """Every field under its fate."""
    config, _ = usual()
    defaults = [
        each
        for each in made.of(Fate.translated, given=False)
        if any(made.settings.get(key) == value and _differs(config, key, value) for key, value in each.settings.items())
    ]
    parts = [
        ("translated", made.of(Fate.translated)),
        ("defaults of theirs that differ here", defaults),
        ("harmless to drop", made.of(Fate.harmless)),
        ("no counterpart", made.of(Fate.lost) + made.of(Fate.lost, given=False)),
        ("unknown", made.of(Fate.unknown)),
    ]
    return "\n".join(line for title, fields in parts if fields for line in _part(title, fields, len(made.read) > 1))


def _differs(config: Any, key: str, value: Any) -> bool:
    return "." not in key or _at(config, key) != value


def _part(title: str, fields: list[Field], several: bool) -> Iterator[str]:
    yield f"{title}:"
    rows = [(printable(f"{each.file}: " * several + _name(each)), printable(_here(each))) for each in fields]
    width = min(48, max(len(name) for name, _ in rows))
    for name, here in rows:
        yield f"  {name:<{width}}   {here}"


def _name(each: Field) -> str:
    return f"{each.name}={show(each.value, each.name)}" if each.value != "" else each.name


def _here(each: Field) -> str:
    keys = " ".join(f"{key}={show(value)}" for key, value in each.settings.items())
    return f"{keys} ({each.why})" if keys and each.why else keys or each.why
