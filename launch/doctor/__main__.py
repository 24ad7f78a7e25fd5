"""`cookbook doctor`: one line per fact, printed as it is found.

    cookbook doctor                                       this machine, and every layout
    cookbook doctor parallel=zero3_nvme parallel.offload.nvme_path=/local_nvme    one layout, as it would run

A line that starts with `!` names something that is missing or outside of what was tested, with its remedy. The exit
code is 2 where a layout that the overrides name cannot run here, else 0.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from configs.entry_point import Arguments, EntryPoint, parse_arguments, show
from configs.errors import EXIT_BAD_CONFIG, EXIT_FINISHED
from configs.interpolation import settle_clock
from configs.load import load_config
from configs.output import delivered
from launch.doctor.fact import Fact
from trainer.process.answering import answered

NAMED = "parallel"  # the group whose options are the layouts
ENTRY_POINT = EntryPoint(
    program="cookbook doctor",
    purpose="Say what is installed, what this machine offers, and what each layout lacks here.",
    examples=(
        ("cookbook doctor", "this machine, and every layout"),
        ("cookbook doctor parallel=zero3 precision=bf16", "whether this configuration can run here"),
        ("cookbook doctor train.run_dir=/shared/runs/a", "the speed of that disk instead of ./runs"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Examine and print. Returns the exit code."""
    given = settle_clock(sys.argv[1:] if argv is None else argv, datetime.now())
    return answered(lambda: _answer(parse_arguments(ENTRY_POINT, given)))


def _answer(arguments: Arguments) -> int:
    if arguments.show is not None:
        print(show(ENTRY_POINT, arguments))
        return delivered(EXIT_FINISHED)
    config = load_config(arguments.overrides, config_dir=arguments.config_dir)
    named = any(word.startswith((f"{NAMED}=", f"{NAMED}.")) for word in arguments.overrides)
    lacking = _print(_examine(arguments, Path(config.train.run_dir or "runs").expanduser(), named=named))
    code = delivered(EXIT_FINISHED)
    return EXIT_BAD_CONFIG if named and lacking["layouts"] else code


def _examine(arguments: Arguments, folder: Path, *, named: bool) -> Iterator[tuple[str, Iterator[Fact]]]:
    # Each part imports more than the one before; known facts are printed meanwhile.
    from launch.doctor.software import software

    yield "software", software()
    from launch.doctor.machine import machine

    yield "machine", machine(folder)
    from launch.doctor.layouts import layouts

    yield "layouts", layouts(arguments.overrides, arguments.config_dir, named=named)


def _print(parts: Iterator[tuple[str, Iterator[Fact]]]) -> dict[str, int]:
    """Returns the number of bad facts in each part."""
    lacking: dict[str, int] = {}
    for title, facts in parts:
        print(f"{title}:", flush=True)
        lacking[title] = 0
        for fact in facts:
            lacking[title] += not fact.well
            print(f"{' ' if fact.well else '!'} {fact.name:<20} {fact.text}", flush=True)
    return lacking


if __name__ == "__main__":
    sys.exit(main())
