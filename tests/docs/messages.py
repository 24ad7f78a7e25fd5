"""The messages that pages quote, held against the strings of the code that says them.

    <!-- messages -->
    the table, block or paragraph that follows, up to an empty line

Of a table and of a paragraph, what stands between backticks is quoted; of a block, all of it. A message is cut into
phrases at what a run puts in (a number, a path, a `key=value`, a NAME in capitals, anything in brackets), at what is
left out (`...`), and at colons, semicolons and commas. Each phrase must stand in a string of the code, word for word.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = ("configs", "launch", "slurm", "trainer")
MARKED = re.compile(r"^<!-- messages -->\n+(.*?)(?:\n\n|\Z)", re.MULTILINE | re.DOTALL)
CUT = re.compile(r"\([^)]*\)|\S*(?:\.\.\.|[0-9=/\[\]]|\b[A-Z_]{2,}\b)\S*|[:;,]")


def messages(page: Path) -> Iterator[str]:
    """What a page quotes behind its markers."""
    for found in MARKED.finditer(page.read_text()):
        block = found[1]
        if block.startswith("    "):
            yield " ".join(line.strip() for line in block.splitlines())
        else:
            rows = [line.rsplit("|", 2)[1] for line in block.splitlines()[2:]] if block.startswith("|") else [block]
            yield from (quoted for row in rows for quoted in re.findall(r"`([^`]+ [^`]+)`", row))


def phrases(message: str) -> list[str]:
    """The runs of words that the code must hold."""
    return [" ".join(run.split()) for run in CUT.split(message) if re.search("[a-z]", run)]


@functools.cache
def said() -> str:
    """Every string of the code that is no docstring, one below the other; an f-string ends where a value is put in."""
    strings: list[str] = []
    for file in (file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))):
        tree = ast.parse(file.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        strings += [
            " ".join(node.value.split())
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
        ]
    return "\n".join(strings)
