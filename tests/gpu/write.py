"""Writes the measurements of `tests.gpu.all` into the docs, with the card, the versions and the date.

    python -m tests.gpu.write gpu-results/results.json           between the markers of the pages
    python -m tests.gpu.write gpu-results/results.json --docs DIR

Nothing is written if a page lacks its markers, or if the results are not from a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.report import TABLES, conditions
from tests.support.measured import write

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {"parity": "one-process.md", "memory": "memory.md", "speed": "one-process.md", "pages": "profiling.md"}
"""The page for the table of each part."""


def command(part: str) -> str:
    """The command that the markers of a part name."""
    return f"python -m tests.gpu.all --only {part}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.write", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="results.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    parser.add_argument("--force", action="store_true", help="also what a CPU has measured, to try it")
    arguments = parser.parse_args(argv)
    found = json.loads(arguments.file.read_text())
    if found["device"] != "cuda" and not arguments.force:
        print(f"{arguments.file}: measured on a CPU; the pages speak of GPUs", file=sys.stderr)
        return 2
    reached = {row["part"] for row in found["results"] if row["status"] != "not reached"}
    parts = {part: arguments.docs / page for part, page in PAGES.items() if part in reached}
    for part, page in parts.items():
        if f"<!-- measured: {command(part)} -->\n" not in page.read_text():
            print(f"{page}: has no line <!-- measured: {command(part)} -->", file=sys.stderr)
            return 2
    for part, page in parts.items():
        write(page, command(part), f"{conditions(found)}\n\n{TABLES[part](found)}")
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
