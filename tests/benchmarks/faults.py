"""Injects faults into runs, counts how many the runs survive, and writes the table of the docs.

    python -m tests.benchmarks.faults                              a few of each kind, some minutes
    python -m tests.benchmarks.faults --counts nightly             the numbers of a release, hours
    python -m tests.benchmarks.faults --only C1 C6 --seed 7        some kinds, with other choices
    python -m tests.benchmarks.faults --write docs/checkpoints.md  and put the table between that page's markers

The seed determines where each case strikes. If a run does not survive a fault, the other cases still run. The exit code
is 1 then, and the message is printed below the table.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support import fault_cases as cases
from tests.support import fault_runs as runs
from tests.support.fault_cases import Bench
from tests.support.measured import conditions, write

COMMAND = "python -m tests.benchmarks.faults"


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    few, nightly: number of repetitions.
    together: whether one call does all repetitions; it gets their number.
    """

    name: str
    what: str
    strike: Callable[..., None]
    few: int
    nightly: int
    together: bool = False


def at_file_operation(layout: str, *more: str, among: str = "") -> Callable[[Bench], None]:
    return lambda bench: cases.killed_at_a_file_operation(bench, layout, *more, among=among)


def at_any_time(layout: str, *more: str) -> Callable[[Bench], None]:
    return lambda bench: cases.killed_at_any_time(bench, layout, *more)


OPERATION = "SIGKILL at an open, fsync, rename, mkdir or deletion of a save, one process"
FAULTS = [
    Fault("C1", OPERATION, at_file_operation("single"), 6, 150),
    Fault("C2", "the same on one of two ranks, fsdp", at_file_operation("fsdp"), 4, 100),
    Fault("C3", "SIGKILL of a rank at any time, fsdp", at_any_time("fsdp"), 4, 50),
    Fault("C4", "SIGKILL of a rank at any time, zero1", at_any_time("zero1"), 1, 30),
    Fault("C4", "SIGKILL of a rank at any time, zero2", at_any_time("zero2"), 1, 30),
    Fault("C4", "SIGKILL of a rank at any time, zero3", at_any_time("zero3"), 1, 30),
    Fault("C5", "C1 during an asynchronous save", at_file_operation("single", "checkpoint.async_save=true"), 2, 30),
    Fault("C6", "one bit flipped anywhere in a checkpoint", cases.flipped, 200, 1000),
    Fault("C7", "a file truncated, emptied, deleted, renamed, one too many, two swapped", cases.damaged, 40, 200),
    Fault("C6-7", "the newest checkpoint damaged, the run goes on from the one before", cases.passed_over, 1, 10),
    Fault("C8", "SIGKILL while a checkpoint is replaced", cases.replaced, 5, 30),
    Fault("C9", "no room for a checkpoint", cases.full, 2, 20),
    Fault("C10", "fsync fails", cases.unflushed, 2, 30),
    Fault("C11", "SIGKILL while an old one is deleted", at_file_operation("single", among=cases.DELETIONS), 3, 50),
    Fault("C12", "SIGKILL before the first checkpoint", at_file_operation("single", among=cases.FIRST_SAVE), 2, 10),
    Fault("C13", "another layout, batch or dtype; another model, seed or data", cases.resumed_otherwise, 4, 24),
    Fault("C14", "order of writes and flushes, against power cuts", cases.ordered, 1, 1),
    Fault("C15", "a second run in the folder; one whose owner is dead", runs.second_writer, 1, 4),
    Fault("C16", "a pickle in the place of a file; a manifest that points elsewhere", runs.hostile, 3, 20),
    Fault("C17", "starts in a row, one step each", cases.again_and_again, 20, 1000, together=True),
    Fault("P1", "SIGKILL of a rank, of the launcher or of a loader process", runs.killed_process, 2, 60),
    Fault("P2", "an exception on one rank", runs.failing, 2, 12),
    Fault("P3", "a rank is stopped, or sleeps", runs.hung, 1, 12),
    Fault("P4", "TERM, INT, USR1, once or often, to one rank", runs.asked_to_stop, 2, 96),
    Fault("P5", "TERM in a slow save, and KILL after the grace or within it", runs.signalled_while_saving, 2, 8),
    Fault("P6", "a rank out of memory", runs.without_memory, 1, 3),
    Fault("P7", "runs of two ranks started at once", runs.started_at_once, 3, 8, together=True),
    Fault("P7", "the port is taken", runs.port_taken, 1, 3),
    Fault("P8", "the wall clock jumps by hours", runs.clock_jumps, 1, 3),
    Fault("P9", "a loss that is not finite: stop, or skip", runs.not_finite, 2, 6),
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
        # pytest.raises fails with an exception that derives from BaseException.
        except (Exception, BaseException) as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            failures.append(f"{type(error).__name__}: {error}")
    return Count(fault=fault, total=repetitions, failures=tuple(failures), seconds=time.monotonic() - before)


def table(counts: Sequence[Count], *, seed: int, kept: Mapping[tuple[str, str], str] | None = None) -> str:
    """Markdown: versions and machine, and for each kind the number of survived faults, the seed and the date.

    kept: rows of an earlier run, by name and description, for the kinds that this run left out.
    """
    rows = dict(kept or {})
    for row in counts:
        survived = row.total if not row.failures else 0 if row.fault.together else row.total - len(row.failures)
        cells = (row.fault.name, row.fault.what, f"{survived} of {row.total}", seed, f"{datetime.now(UTC):%Y-%m-%d}")
        rows[row.fault.name, row.fault.what] = f"| {' | '.join(map(str, cells))} |"
    order = [(fault.name, fault.what) for fault in FAULTS]
    return "\n".join(
        [
            f"{conditions('torch', 'deepspeed', 'safetensors')}, gloo.",
            "",
            "| | fault | survived | seed | tried |",
            "| --- | --- | --- | --- | --- |",
            *sorted(rows.values(), key=lambda line: _place(line, order)),
            "",
        ]
    )


def rows_of(page: Path) -> dict[tuple[str, str], str]:
    """The page's rows for existing kinds, by name and description."""
    known = {(fault.name, fault.what) for fault in FAULTS}
    cells = {tuple(line.split(" | ")[:2]): line for line in page.read_text().splitlines() if line.startswith("| ")}
    return {key: line for (name, *what), line in cells.items() if (key := (name[2:], "".join(what))) in known}


def _place(line: str, order: list[tuple[str, str]]) -> int:
    name, what, *_ = line[2:].split(" | ")
    return order.index((name, what)) if (name, what) in order else len(order)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--counts", choices=("one", "few", "nightly"), default="few", help="how many of each kind (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=sorted({fault.name for fault in FAULTS}))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="page with the markers; rows of kinds not tried stay"
    )
    arguments = parser.parse_args(argv)
    counts: list[Count] = []
    with TemporaryDirectory() as folder:
        for fault in FAULTS:
            if arguments.only and fault.name not in arguments.only:
                continue
            bench = Bench(Path(folder, fault.name + fault.what[-5:]), random.Random(f"{arguments.seed} {fault.what}"))
            bench.folder.mkdir()
            once = arguments.counts == "one"
            number = 1 if once and not fault.together else fault.few if once else getattr(fault, arguments.counts)
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
        write(arguments.write, COMMAND, table(counts, seed=arguments.seed, kept=rows_of(arguments.write)))
    return 1 if any(row.failures for row in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
