"""Pytest plugin: what the tests took, by the clock and by the processors, and where it went.

    python -m tests.spent FILE                                  the table of CONTRIBUTING.md, of a session's file
    python -m tests.spent FILE --write                          and put it there
    python -m tests.spent FILE --files                          one line for each file of tests, slowest first

`--spent=FILE` writes one JSON line per test: nodeid, lane (the xdist worker), start, wall, cpu and outcome. (With the
=: pytest would take a word of its own for a path.) With it, or with several lanes, the session ends with the budget: a
line for each kind of test in KINDS.

cpu: seconds of this process and of all below it, with forked ranks and entry points in their own processes. What a test
leaves to daemons is not in it: a Slurm job's ranks are children of slurmd.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

# kind -> (what it proves, the files below tests/). The first that matches counts. CONTRIBUTING.md has the table.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "slurm": ("jobs on a real Slurm of four nodes, faults included", ("slurm/*",)),
    "parity": (
        "every layout, schedule and option equals one process; planted bugs show",
        (
            *("test_parity*", "test_mutations*", "test_tensor_parallel*", "test_pipeline_parallel*", "test_tuning*"),
            *(
                "test_quantized*",
                "test_deepspeed_steps*",
                "test_document_mask*",
                "test_pieces*",
                "test_sequence_check*",
            ),
            *("test_families*", "test_expert_parallel*", "test_moe*", "test_muon*"),
        ),
    ),
    "checkpoints": (
        "a save survives a kill, damage is found, every layout goes on from every other",
        ("test_checkpoint_*", "test_faults*", "test_swap*"),
    ),
    "lifetimes": (
        "signals, restarts, hung ranks, out of memory, two hosts",
        (
            *("test_launch_*", "test_restarts*", "test_watchdog*", "test_exhausted*", "test_nodes*", "test_slurm_*"),
            "test_preflight*",
        ),
    ),
    "memory": ("predicted against measured; estimates, suggestions, the planner", ("test_memory_*", "test_planner*")),
    "docs": ("every command runs as printed; made parts and messages are the code's", ("test_docs*",)),
    "data": ("files, streams, tokenizers, caches", ("test_data_*",)),
    "reports": ("metrics, trackers, comparison, profiles", ("test_report_*", "test_comparison*", "test_profiling*")),
    "units": ("configuration, plans, models, optimizers, imports, packaging", ("*",)),
}
BUDGET_MINUTES = 30
PAGE = Path(__file__).parent.parent / ".github" / "CONTRIBUTING.md"
COMMAND = "python -m tests.spent"


def kind_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next(kind for kind, (_, files) in KINDS.items() if any(fnmatch(file, pattern) for pattern in files))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--spent", type=Path, metavar="FILE", help="write what each test took to FILE, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    # A worker has no terminal: it hands what it measured to the process that started it.
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Meter(), "meter")
    elif config.getoption("--spent") or config.getoption("numprocesses", None):
        config.pluginmanager.register(Meter(), "meter")
        config.pluginmanager.register(Ledger(config.getoption("--spent")), "ledger")


class Meter:
    """Measures around each test, and puts that on its last report."""

    begun: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        self.begun = time.time(), time.monotonic(), cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        if call.when == "teardown":
            start, clock, cpu = self.begun
            wall, cpu = time.monotonic() - clock, cpu_seconds() - cpu
            spent = {"lane": os.environ.get("PYTEST_XDIST_WORKER", "")}
            spent |= {"start": round(start, 1), "wall": round(wall, 2), "cpu": round(cpu, 2)}
            report.user_properties.append(("spent", spent))
        return report


class Ledger:
    """Collects what was measured, writes it to the file, and prints the budget at the end."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.outcomes: dict[str, str] = {}
        self.begun = time.monotonic()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
        for name, spent in report.user_properties:
            if name == "spent" and report.when == "teardown":
                assert isinstance(spent, dict)
                row = {"nodeid": report.nodeid, **spent, "outcome": self.outcomes.get(report.nodeid, "passed")}
                self.rows.append(row)
                if self.file:
                    with self.file.open("a") as out:
                        out.write(json.dumps(row) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.rows:
            terminalreporter.section("how the budget was spent")
            for line in budget(self.rows, time.monotonic() - self.begun):
                terminalreporter.write_line(line)


def budget(rows: list[dict[str, Any]], session: float) -> Iterator[str]:
    """The table: one line per kind of test, and for each lane how long it worked. session: seconds by the clock."""
    tests, wall, cpu = Counter[str](), Counter[str](), Counter[str]()
    lanes = Counter[str]()
    for row in rows:
        kind = kind_of(row["nodeid"])
        tests[kind] += 1
        wall[kind] += row["wall"]
        cpu[kind] += row["cpu"]
        lanes[row["lane"] or "the only lane"] += row["wall"]
    yield f"{'kind':12} {'tests':>6} {'clock':>8} {'processors':>11}  what it proves"
    for kind, (what, _) in KINDS.items():
        if tests[kind]:
            yield f"{kind:12} {tests[kind]:6} {wall[kind]:6.0f} s {cpu[kind]:9.0f} s  {what}"
    yield f"{'all':12} {tests.total():6} {wall.total():6.0f} s {cpu.total():9.0f} s"
    worked = ", ".join(f"{lane} {seconds:.0f} s" for lane, seconds in sorted(lanes.items()))
    yield f"{session / 60:.1f} min by the clock, of {BUDGET_MINUTES}; lanes worked: {worked}"


def cpu_seconds() -> float:
    """Of this process, of those below it that live, and of all that they have waited for."""
    return sum(map(_cpu_seconds, _family(os.getpid())))


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended, or the kernel keeps no such list
        return
    for child in children:
        yield from _family(int(child))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # User, system, and both of the children it has waited for: fields 14 to 17 of proc_pid_stat(5).
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def by_kind(rows: list[dict[str, Any]]) -> str:
    """Markdown: which tests prove what, and what each kind costs."""
    lines = [
        "| kind | files below `tests/` | what it proves | tests | clock | processors |",
        "| --- " * 3 + "| ---: " * 3 + "|",
    ]
    for kind, (what, files) in KINDS.items():
        mine = [row for row in rows if kind_of(row["nodeid"]) == kind]
        wall, cpu = (sum(row[name] for row in mine) / 60 for name in ("wall", "cpu"))
        named = ", ".join(f"`{file}`" for file in files) if files != ("*",) else "all others"
        lines.append(f"| {kind} | {named} | {what} | {len(mine)} | {wall:.1f} min | {cpu:.1f} min |")
    return "\n".join([*lines, ""])


def by_file(rows: list[dict[str, Any]]) -> str:
    tests, wall, cpu = _of_files(rows)
    return "\n".join(
        f"{cpu[file]:7.0f} s of processors {wall[file]:7.0f} s {tests[file]:5} {file}" for file, _ in cpu.most_common()
    )


def dearest(rows: list[dict[str, Any]], least: float = 0.01) -> str:
    """Markdown: the files that take a hundredth of the processors' time or more."""
    tests, _, cpu = _of_files(rows)
    lines = ["| file below `tests/` | tests | seconds of processors |", "| --- | ---: | ---: |"]
    for file, seconds in cpu.most_common():
        if seconds >= least * cpu.total():
            lines.append(f"| `{file.removeprefix('tests/')}` | {tests[file]} | {seconds:.0f} |")
    return "\n".join([*lines, f"| all {len(cpu)} | {tests.total()} | {cpu.total():.0f} |", ""])


def _of_files(rows: list[dict[str, Any]]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Tests, seconds by the clock, and seconds of processors."""
    tests, wall, cpu = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        file = row["nodeid"].partition("::")[0]
        tests[file] += 1
        wall[file] += row["wall"]
        cpu[file] += row["cpu"]
    return tests, wall, cpu


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="What a session of tests took.")
    parser.add_argument("file", type=Path, help="of pytest --spent")
    parser.add_argument("--files", action="store_true", help="one line for each file")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args(argv)
    rows = [json.loads(line) for line in arguments.file.read_text().splitlines()]
    print(by_file(rows) if arguments.files else by_kind(rows))
    if arguments.write:
        from tests.support.measured import conditions, write

        lanes = len({row["lane"] for row in rows})
        write(PAGE, COMMAND, f"{conditions('torch', 'pytest')}, {lanes} lanes.\n\n{by_kind(rows)}\n{dearest(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
