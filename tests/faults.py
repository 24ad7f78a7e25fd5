"""How many of so many faults a run survives: injects them, counts, and writes the table of the docs.

    python -m tests.faults                              a few of each kind, some minutes
    python -m tests.faults --counts nightly             the numbers of a release, hours
    python -m tests.faults --only C1 C6 --seed 7        some kinds, with other choices
    python -m tests.faults --write docs/checkpoints.md  and put the table between that page's markers

Each case chooses where it strikes from the seed. The first that is not survived does not stop the others; the exit code
is 1 then, and its message stands below the table.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import fault_cases as cases
from tests.fault_cases import Bench
from tests.measured import conditions, write

COMMAND = "python -m tests.faults"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """few, nightly: how often. together: the repetitions are one call, which is given their number."""

    name: str
    what: str
    strike: Callable[..., None]
    few: int
    nightly: int
    together: bool = False


def at_file_operation(layout: str, *more: str) -> Callable[[Bench], None]:
    return lambda bench: cases.killed_at_a_file_operation(bench, layout, *more)


def at_any_time(layout: str, *more: str) -> Callable[[Bench], None]:
    return lambda bench: cases.killed_at_any_time(bench, layout, *more)


ASIDE = "checkpoint.async_save=true"
FAULTS = [
    Fault(
        name="C1",
        what="SIGKILL at an open, fsync, rename, mkdir or deletion of a save, one process",
        strike=at_file_operation("single"),
        few=6,
        nightly=150,
    ),
    Fault(name="C2", what="the same on one of two ranks, fsdp", strike=at_file_operation("fsdp"), few=4, nightly=100),
    Fault(name="C3", what="SIGKILL of a rank at any time, fsdp", strike=at_any_time("fsdp"), few=4, nightly=50),
    *(
        Fault(name="C4", what=f"SIGKILL of a rank at any time, {zero}", strike=at_any_time(zero), few=1, nightly=30)
        for zero in ("zero1", "zero2", "zero3")
    ),
    Fault(name="C5", what="C1 while saving aside", strike=at_file_operation("single", ASIDE), few=2, nightly=30),
    Fault(name="C6", what="one bit flipped anywhere in a checkpoint", strike=cases.flipped, few=200, nightly=1000),
    Fault(
        name="C7",
        what="a file truncated, emptied, deleted, renamed, one too many, two swapped",
        strike=cases.damaged,
        few=40,
        nightly=200,
    ),
    Fault(
        name="C6-7",
        what="the newest checkpoint damaged, the run goes on from the one before",
        strike=cases.passed_over,
        few=1,
        nightly=10,
    ),
    Fault(name="C8", what="SIGKILL while a checkpoint is replaced", strike=cases.replaced, few=5, nightly=30),
    Fault(name="C9", what="no room for a checkpoint", strike=cases.full, few=2, nightly=20),
    Fault(name="C10", what="fsync fails", strike=cases.unflushed, few=2, nightly=30),
    Fault(name="C14", what="order of writes and flushes, against power cuts", strike=cases.ordered, few=1, nightly=1),
    Fault(
        name="C17",
        what="starts in a row, one step each",
        strike=cases.again_and_again,
        few=20,
        nightly=1000,
        together=True,
    ),
    Fault(name="P2", what="an exception on one rank", strike=cases.failing, few=2, nightly=12),
    Fault(name="P4", what="TERM, INT, USR1, once or often, to one rank", strike=cases.told_to_stop, few=2, nightly=96),
    Fault(name="P9", what="a loss that is not finite", strike=cases.not_finite, few=1, nightly=6),
]


@dataclass(frozen=True, kw_only=True)
class Count:
    fault: Fault
    total: int
    failures: tuple[str, ...]
    seconds: float


def count(fault: Fault, repetitions: int, bench: Bench) -> Count:
    failures: list[str] = []
    before = time.monotonic()
    for _ in range(1 if fault.together else repetitions):
        try:
            fault.strike(bench, repetitions) if fault.together else fault.strike(bench)
        # A case that pytest.raises finds wrong derives from BaseException.
        except (Exception, BaseException) as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            failures.append(f"{type(error).__name__}: {error}")
    return Count(fault=fault, total=repetitions, failures=tuple(failures), seconds=time.monotonic() - before)


def table(counts: Sequence[Count], *, seed: int) -> str:
    """Markdown: when, with what, on what, and of each kind how many were survived."""
    minutes = sum(row.seconds for row in counts) / 60
    lines = [
        f"{conditions('torch', 'deepspeed', 'safetensors')}, gloo, seed {seed}, in {minutes:.0f} minutes.",
        "",
        "| | fault | survived |",
        "| --- | --- | --- |",
    ]
    for row in counts:
        survived = row.total if not row.failures else 0 if row.fault.together else row.total - len(row.failures)
        lines.append(f"| {row.fault.name} | {row.fault.what} | {survived} of {row.total} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--counts", choices=("one", "few", "nightly"), default="few", help="how many of each kind")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=sorted({fault.name for fault in FAULTS}))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with the markers")
    arguments = parser.parse_args(argv)
    counts: list[Count] = []
    with TemporaryDirectory() as folder:
        for fault in FAULTS:
            if arguments.only and fault.name not in arguments.only:
                continue
            bench = Bench(Path(folder, fault.name + fault.what[-5:]), random.Random(f"{arguments.seed} {fault.what}"))
            bench.folder.mkdir()
            number = 1 if arguments.counts == "one" else getattr(fault, arguments.counts)
            counts.append(count(fault, number, bench))
            row = counts[-1]
            print(
                f"{fault.name:5} {row.total - len(row.failures):4} of {row.total:4}  {row.seconds:6.1f} s  {fault.what}"
            )
            sys.stdout.flush()
    text = table(counts, seed=arguments.seed)
    print(f"\n{text}")
    for row in counts:
        for failure in row.failures:
            print(f"{row.fault.name}: {failure}")
    if arguments.write:
        write(arguments.write, COMMAND, text)
    return 1 if any(row.failures for row in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
