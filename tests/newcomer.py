"""A newcomer's path: a fresh clone, a fresh environment, the README from top to bottom, every command as printed.

    python -m tests.newcomer               all but the tests
    python -m tests.newcomer --tests       and `bash tests/run.sh`, which takes half an hour
    python -m tests.newcomer --commands    prints them only

It clones what is committed, and stops at the first command that fails. For OVERRIDES in the table of entry points it
puts those of a short run, data parallel where a launcher starts two processes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
OVERRIDES = "data=synthetic data.seq_len=64 train.steps=2 train.eval_samples=0"
# In the order of the page: the two commands at its head, blocks of bash, the first column of the entry points.
COMMAND = re.compile(
    r"^    (?P<first>bash \S+)|^```bash\n(?P<block>.*?)^```$|^\| `(?P<row>[^`|]* OVERRIDES)` \|",
    re.MULTILINE | re.DOTALL,
)
TESTS = "bash tests/run.sh"


def commands(page: str, *, tests: bool) -> Iterator[str]:
    """What to type, in the order of the page. tests: whether the command that runs all tests is among it."""
    for found in COMMAND.finditer(page):
        if found["block"]:
            yield found["block"].strip()
        elif found["row"]:
            layout = "" if found["row"].startswith("python") else "parallel=ddp "
            yield found["row"].replace("OVERRIDES", layout + OVERRIDES)
        elif tests or found["first"] != TESTS:
            yield found["first"]


def walk(clone: Path, *, tests: bool) -> int:
    """Run them. Returns the exit code of the one that failed, or 0."""
    activate = "[ ! -e .venv/bin/activate ] || source .venv/bin/activate"
    for command in commands((clone / "README.md").read_text(), tests=tests):
        print(f"$ {command}", flush=True)
        begin = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{activate}\n{command}"],
            cwd=clone,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(f"  exit code {done.returncode} after {time.monotonic() - begin:.0f} s", flush=True)
        if done.returncode:
            print(done.stdout[-5000:])
            return done.returncode
    return 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.newcomer", description="Walk the README from a fresh clone.")
    parser.add_argument("--tests", action="store_true", help="the command that runs all tests too")
    parser.add_argument("--commands", action="store_true", help="print the commands, run none")
    arguments = parser.parse_args(argv)
    if arguments.commands:
        print("\n".join(commands((ROOT / "README.md").read_text(), tests=True)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "distributed-training-cookbook"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        return walk(clone, tests=arguments.tests)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
