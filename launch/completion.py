"""`cookbook completion`: shell completion of commands, groups, keys and values.

    source <(cookbook completion bash)        in ~/.bashrc; zsh: the same in ~/.zshrc, below compinit
    cookbook completion fish | source         in ~/.config/fish/config.fish
    cookbook completion answer "cookbook train train.st"      used by the three scripts: prints one candidate a line

If there is no candidate, the shell offers files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from types import NoneType
from typing import get_args

from configs.entry_point import print_problems
from configs.errors import EXIT_FINISHED, ConfigError
from configs.keys import plain_kind, schema_keys
from configs.load import group_options
from configs.output import delivered, guard_output

OVERRIDES = ("train", "launch", "estimate", "compare", "doctor")
"""Commands that take overrides; the others take folders and files."""
FLAGS = ("--help", "--cfg", "--info", "--config-dir", "--version")
PROGRAMS = {"memory-estimate": "estimate"}

BASH = r"""
_cookbook() {
    local line=${COMP_LINE:0:COMP_POINT} IFS=$'\n' word
    COMPREPLY=($(cookbook completion answer "$line" 2>/dev/null))
    word=${line##* }
    # Bash ends a word at "=": the part before it stands already.
    if [[ $COMP_WORDBREAKS == *=* && $word == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _cookbook cookbook memory-estimate
"""
ZSH = r"""
_cookbook() {
    local -a found
    found=("${(@f)$(cookbook completion answer "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    if [[ -z "$found" ]]; then compset -P '*='; _files; return; fi
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
}
compdef _cookbook cookbook memory-estimate
"""
FISH = r"""
function __cookbook_answer
    cookbook completion answer (commandline -cp | string collect) 2>/dev/null
end
for program in cookbook memory-estimate
    complete -c $program -f -a '(__cookbook_answer)'
    complete -c $program -n 'not count (__cookbook_answer) >/dev/null' -F
end
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a shell's script, or the candidates for a line. Returns the exit code."""
    guard_output()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(f"cookbook completion {'|'.join(SCRIPTS)}\n\nPrint the script with which that shell completes cookbook.")
    elif len(arguments) == 2 and arguments[0] == "answer":
        for candidate in candidates(arguments[1]):
            print(candidate)
    elif len(arguments) == 1 and arguments[0] in SCRIPTS:
        print(SCRIPTS[arguments[0]].strip())
    else:
        shown = " ".join(arguments) or "(nothing)"
        return print_problems(ConfigError(f"cookbook completion {shown}: name a shell; choose {', '.join(SCRIPTS)}"))
    return delivered(EXIT_FINISHED)


def candidates(line: str) -> list[str]:
    """Candidates for the last word of a command line, up to the cursor; none if a file is wanted."""
    from launch.cookbook import COMMANDS  # imported here: it imports this module

    program, *arguments = line.split(" ")
    *before, last = [word for word in arguments[:-1] if word] + arguments[-1:] or [""]
    if program in PROGRAMS:
        before = [PROGRAMS[program], *before]
    if not before:
        return [name for name in COMMANDS if name.startswith(last)]
    if before[0] not in OVERRIDES or before[-1] in ("--config-dir", "-cd"):
        return []
    if before[-1] in ("--cfg", "-c"):
        return ["job"]
    if last.startswith("-"):
        return [flag for flag in FLAGS if flag.startswith(last)]
    named = [after for flag, after in pairwise(before) if flag in ("--config-dir", "-cd")]
    return sorted(set(_override(last, group_options(*named[:1]))))


def _override(last: str, groups: dict[str, list[str]]) -> Iterator[str]:
    """group=option, section.key=value; a key is completed one step at a time."""
    key, equals, text = last.partition("=")
    mark = key[: len(key) - len(key.lstrip("+~"))]
    key = key.removeprefix(mark)
    if equals:
        done, comma, part = text.rpartition(",")
        for value in _values(key, groups):
            if value.startswith(part):
                yield f"{mark}{key}={done}{comma}{value}"
        return
    yield from (f"{mark}{group}=" for group in groups if group.startswith(key))
    for name in schema_keys():
        if name.startswith(key):
            step, dot, _ = name[len(key) :].partition(".")
            yield f"{mark}{key}{step}{dot or '='}"


def _values(key: str, groups: dict[str, list[str]]) -> list[str]:
    if key in groups:
        return groups[key]
    if key not in schema_keys():
        return []
    kind = plain_kind(key)
    values: list[str] = []
    if kind is bool:
        values = ["true", "false"]
    elif isinstance(kind, type) and issubclass(kind, StrEnum):
        values = [str(each) for each in kind]
    return [*values, "null"] if values and NoneType in get_args(schema_keys()[key]) else values


if __name__ == "__main__":
    sys.exit(main())
