"""Writes the made parts of README and docs: what stands between `<!-- made: NAME ARGUMENTS -->` and `<!-- end -->`.

    python -m tests.docs.write                     every part of every page; some minutes, of runs and traces
    python -m tests.docs.write --quick             only those that need neither
    python -m tests.docs.write README.md           of one page

NAME is a function of blocks, matrix, numbers, comparison or tuning; its arguments are quoted as for a shell. The tests
fail where a quick part is not what its function returns. Parts of docs/zh/ are copied from the English page.
docs/parity.md is written by `pytest tests --write-docs`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.docs import blocks, chinese
from tests.docs.matrix import matrix

ROOT = Path(__file__).parents[2]
MADE = re.compile(r"(<!-- made: (?P<name>\w+)(?P<arguments>[^\n]*?) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
QUICK: dict[str, Callable[..., str]] = {
    **{
        function.__name__: function
        for function in (
            blocks.bubbles,
            blocks.commands,
            blocks.difference,
            blocks.drawing,
            blocks.dtypes,
            blocks.foreign,
            blocks.layouts,
            blocks.measured,
            blocks.parity,
            blocks.predictions,
            blocks.ranks,
            blocks.refusal,
            blocks.schedule,
        )
    },
    "matrix": matrix,
}
COSTLY = ("memory", "components", "estimated", "fits", "holding", "picture", "precisions", "predicted", "published")
"""Functions of numbers, which imports what runs."""
COSTLY += ("comparison", "profiled")  # of comparison
COSTLY += ("methods",)  # of tuning


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One made part of a page. arguments: as written in the marker. text: between the markers, as it stands."""

    page: Path
    name: str
    arguments: tuple[str, ...]
    text: str

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return self.name, self.arguments

    @property
    def quick(self) -> bool:
        return self.name in QUICK or chinese.is_chinese(self.page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def parts(page: Path) -> Iterator[Part]:
    """The made parts of a page, in order."""
    for found in MADE.finditer(page.read_text()):
        arguments = tuple(shlex.split(found["arguments"]))
        yield Part(page=page, name=found["name"], arguments=arguments, text=found["text"].strip("\n"))


def make(part: Part) -> str:
    """What belongs between the markers."""
    if chinese.is_chinese(part.page):
        same = (other for other in parts(chinese.english(part.page)) if (other.name, other.arguments) == part.key)
        return chinese.moved(next(same).text)
    if part.quick:
        return QUICK[part.name](*part.arguments)
    assert part.name in COSTLY, f"{part.page.name}: nothing makes {part.name}"
    return getattr(import_module("tests.docs.numbers"), part.name)(*part.arguments)


def write(page: Path, *, quick: bool) -> bool:
    """Make the parts of a page again. Returns whether that changed it."""
    made = iter(list(parts(page)))

    def replace(found: re.Match[str]) -> str:
        part = next(made)
        text = make(part) if part.quick or not quick else part.text
        return f"{found[1]}{text}\n{found[5]}"

    before = page.read_text()
    after = MADE.sub(replace, before)
    if after != before:
        page.write_text(after)
    return after != before


def main(argv: Sequence[str]) -> int:
    """Write the pages that are named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.docs.write", description="Make the made parts of pages again."
    )
    parser.add_argument("--quick", action="store_true", help="only those that need no runs and no traces")
    parser.add_argument("pages", nargs="*", type=Path, help="default: all")
    arguments = parser.parse_args(argv)
    for page in [page.resolve() for page in arguments.pages] or pages():
        print(f"{page.name}: {'written' if write(page, quick=arguments.quick) else 'as it was'}", flush=True)
    if not arguments.quick:
        for page in pages():  # which quote the tables of what-fills-memory.md
            write(page, quick=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
