"""Everything, the nightly tests too. What has passed at this commit is not run again.

    python -m tests.nightly              all that has not passed at this commit, hours
    python -m tests.nightly --list       what that is
    python -m tests.nightly --faults     python -m tests.benchmarks.faults --counts nightly as well, hours more

Stopped at any time, it goes on where it was: what has passed stands in .pytest_cache/nightly/COMMIT.txt. Changes that
are not committed count as a commit of their own. Arguments after -- go to pytest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.faults import FAULTS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".pytest_cache" / "nightly"


def commit() -> str:
    """The commit, and a hash of what is not committed."""
    head = _git("rev-parse", "--short=12", "HEAD").strip()
    others = _git("ls-files", "--others", "--exclude-standard").splitlines()
    changed = _git("diff", "HEAD") + "".join(f"{name}\n{(ROOT / name).read_bytes()!r}" for name in others)
    return f"{head}+{hashlib.sha256(changed.encode()).hexdigest()[:12]}" if changed else head


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def collected(arguments: Sequence[str]) -> list[str]:
    found = _pytest("--collect-only", "-q", "--nightly", *arguments, capture=True)
    return [line for line in found.stdout.splitlines() if "::" in line]


def run_tests(passed: Path, arguments: Sequence[str], lanes: int) -> int:
    """Those that have not passed. Notes what does, also if this is interrupted."""
    done = set(passed.read_text().splitlines()) if passed.exists() else set[str]()
    left = [nodeid for nodeid in collected(arguments) if nodeid not in done]
    print(f"{len(done)} tests have passed at this commit, {len(left)} are left", flush=True)
    if not left:
        return 0
    spent, names = passed.with_suffix(".jsonl"), passed.with_suffix(".left")
    names.write_text("\n".join(left))
    try:
        options = ("-n", str(lanes), "--nightly", f"--spent={spent}", "--override-ini=timeout=600")
        return _pytest(*options, *arguments, f"@{names}").returncode
    finally:
        with passed.open("a") as out:
            for row in map(json.loads, spent.read_text().splitlines()):
                if row["outcome"] in ("passed", "skipped"):
                    out.write(f"{row['nodeid']}\n")


def run_faults(passed: Path) -> int:
    done = set(passed.read_text().splitlines()) if passed.exists() else set[str]()
    failed = 0
    for kind in sorted({fault.name for fault in FAULTS}):
        if f"fault {kind}" in done:
            continue
        arguments = [sys.executable, "-m", "tests.benchmarks.faults", "--counts", "nightly", "--only", kind]
        code = subprocess.run(arguments, cwd=ROOT).returncode
        if code == 0:
            with passed.open("a") as out:
                out.write(f"fault {kind}\n")
        failed |= code
    return failed


def _pytest(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=capture)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.nightly", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--list", action="store_true", help="print what is left, and run nothing")
    parser.add_argument("--faults", action="store_true", help="the counted faults as well")
    parser.add_argument("--lanes", type=int, default=3, help="tests at the same time (%(default)s)")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="for pytest")
    arguments = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    passed = FOLDER / f"{commit()}.txt"
    if arguments.list:
        done = set(passed.read_text().splitlines()) if passed.exists() else set[str]()
        print(*(nodeid for nodeid in collected(arguments.arguments) if nodeid not in done), sep="\n")
        return 0
    failed = run_tests(passed, arguments.arguments, arguments.lanes)
    return failed or (run_faults(passed) if arguments.faults else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
