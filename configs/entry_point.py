"""Shared by every entry point: arguments, `--help`, and one line for each mistake.

    python -m launch [key=value ...] [--config-dir DIR] [--help | --version | --cfg job | --info] [-m]

The flags are Hydra's, and overrides mean what they mean to Hydra. The ranks of a job parse them too and must not run
`@hydra.main`, which makes a folder per rank. Nothing here imports torch, so every answer is instant.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from configs import foreign
from configs.errors import ConfigError, CookbookError
from configs.load import chosen_options, group_options, load_config, to_yaml
from configs.overrides import settled
from configs.packages import installed

PROJECT = "distributed-training-cookbook"
LONGEST_LINE = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryPoint:
    """purpose: one sentence for `--help`. examples: (command, description). sweeps: whether `-m` is accepted.
    translates: whether `--from` is accepted."""

    program: str
    purpose: str
    examples: tuple[tuple[str, str], ...]
    sweeps: bool = False
    translates: bool = False

    def help(self, config_dir: str | None = None) -> str:
        """Half a page: three commands, then every group with its options."""
        width = max(len(command) for command, _ in self.examples)
        chosen = chosen_options(config_dir=config_dir)
        groups = [
            f"  {group:<11}{'  '.join(name + '*' * (name == chosen[group]) for name in options)}"
            for group, options in group_options(config_dir).items()
        ]
        flags = [
            "  --cfg job         print the whole configuration of these overrides: every key with its value",
            "  --info            print which file each group is taken from",
            "  --config-dir DIR  search DIR for options as well: DIR/model/mine.yaml is model=mine",
            *["  --from FILE       the configuration of another trainer; overrides win over it"] * self.translates,
            *["  -m                run once for each combination: train.seed=1,2 parallel=ddp,zero2"] * self.sweeps,
        ]
        lines = [
            f"{self.purpose}",
            "",
            *(f"  {command:<{width}}   {description}" for command, description in self.examples),
            "",
            "group=option chooses a file (* is the default), section.key=value sets one key:",
            "",
            *groups,
            "",
            *flags,
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """overrides: as typed. show: "help", "version", "cfg", "info", or None to run the entry point. sources: files of
    `--from`."""

    overrides: tuple[str, ...]
    config_dir: str | None
    show: str | None
    sweep: bool
    sources: tuple[str, ...] = ()


def parse_arguments(entry_point: EntryPoint, argv: Sequence[str]) -> Arguments:
    """Split a command line into flags and overrides. Raises ConfigError on an unknown flag."""
    parser = Parser(prog=entry_point.program, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", dest="show", action="store_const", const="help")
    parser.add_argument("--version", dest="show", action="store_const", const="version")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("--info", dest="show", action="store_const", const="info")
    parser.add_argument("-cd", "--config-dir")
    # The deepspeed launcher appends it to the arguments of every rank; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int)
    if entry_point.sweeps:
        parser.add_argument("-m", "--multirun", dest="sweep", action="store_true")
    if entry_point.translates:
        parser.add_argument("--from", dest="sources", action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    known = {word: foreign.answer(word[2:].partition("=")[0]) for word in argv if word.startswith("--")}
    if any(known.values()):
        lines = (f"{word}: no such flag; here it is {key}, without dashes" for word, key in known.items() if key)
        raise ConfigError(*lines)
    found = parser.parse_intermixed_args(argv)
    return Arguments(
        overrides=tuple(settled(found.overrides)),
        config_dir=found.config_dir,
        show="cfg" if found.cfg else found.show,
        sweep=entry_point.sweeps and found.sweep,
        sources=tuple(found.sources) if entry_point.translates else (),
    )


class Parser(argparse.ArgumentParser):
    """Like argparse's, but a mistake raises ConfigError, which is printed as one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def show(entry_point: EntryPoint, arguments: Arguments) -> str:
    """The text that `--help`, `--version`, `--cfg job` or `--info` asks for."""
    if arguments.show == "version":
        return version()
    if arguments.show == "help":
        return entry_point.help(arguments.config_dir)
    if arguments.show == "cfg":
        return to_yaml(load_config(arguments.overrides, config_dir=arguments.config_dir)).rstrip()
    chosen = chosen_options(arguments.overrides, config_dir=arguments.config_dir)
    return "\n".join(f"{group:<11}{option or '-'}" for group, option in sorted(chosen.items()))


def version() -> str:
    """The versions of this project and of the training libraries: one line for a bug report."""
    names = (PROJECT, "torch", "transformers", "deepspeed")
    found = {name: installed(name) or "(not installed)" for name in names}
    return f"{', '.join(f'{name} {number}' for name, number in found.items())}, Python {platform.python_version()}"


def print_problems(error: CookbookError) -> int:
    """Print a user's mistakes, one line each, without a traceback. Returns the exit code."""
    for line in dict.fromkeys(one_line(problem) for problem in error.problems):
        print(line, file=sys.stderr)
    return error.exit_code


def one_line(problem: str) -> str:
    """A problem as one terminal line, whatever characters its value holds."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in problem)
    return shown if len(shown) <= LONGEST_LINE else f"{shown[: LONGEST_LINE // 2]} ... {shown[-LONGEST_LINE // 2 :]}"
