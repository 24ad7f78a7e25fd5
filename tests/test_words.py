"""House words that this project no longer uses, each with the standard term that replaces it.

The list grows folder by folder: a word is added once it no longer occurs in the folders in which it is banned.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EDGE = r"(?-i:(?<=[a-z])(?=[A-Z]))"  # between the words of a name such as EntryPoint
PAGES = ("README.md", ".github/*.md", "docs/*.md")
CODE = ("configs/**/*", "trainer/**/*", "launch/**/*", "slurm/**/*", "tests/**/*", "findings/**/*")
TEXT = {".cfg", ".css", ".html", ".js", ".md", ".py", ".sbatch", ".sh", ".yaml", ".yml"}

EVERYWHERE = {
    r"so long(?! that)": "how long, until",
    r"so often": "how many times",
    r"at the most": "at most",
    r"in place of": "instead of",
    r"anew": "again",
    r"(stood|stands?) still": "checkpoint stall",
    r"matrix products?": "matmul",
    r"keepers?": "checkpoint manager",
    r"told": "asked, reported",
    r"doors?": "entry point",
}
IN_PROSE = {
    r"beside": "next to, in addition to",
    r"whoever": "the reader, the writer",
    r"dear(er|est)?": "slow, expensive",
}
IN_PAGES = {
    r"words": "overrides, vocabulary entries",
    r"(loss|gradients?|parameters|norm|%|MiB \|) apart": "difference",
}


def _files(patterns: tuple[str, ...]) -> list[Path]:
    found = {file for pattern in patterns for file in ROOT.glob(pattern) if file.suffix in TEXT}
    return sorted(found - {Path(__file__)})


def prose(file: Path, text: str) -> str:
    """Return a module's comments and its strings of several words, on their lines; other files are returned whole."""
    if file.suffix != ".py":
        return text
    lines = [""] * (text.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] += f" {token.string}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 1:
            for number, line in enumerate(node.value.split("\n"), node.lineno - 1):
                lines[min(number, len(lines) - 1)] += f" {line}"
    return "\n".join(lines)


def uses(words: dict[str, str], files: list[Path], *, prose_only: bool = False) -> list[str]:
    """Return a message for each use of a banned word, with its place and its replacement.

    A use may be broken over two lines, and may be part of a name (entry_point, EntryPoint). Line 0 is the file's name.

    prose_only: ignore names in Python code, and of files.
    """
    found: list[str] = []
    texts = {file: f"{'' if prose_only else file.stem}\n{file.read_text()}" for file in files}
    lowered = {file: text.lower() for file, text in texts.items()}
    for word, instead in words.items():
        spaced = word.replace(" ", r"[\s#_]+")
        pattern = re.compile(rf"(?:(?<![^\W_])|{EDGE}){spaced}(?:(?![^\W_])|{EDGE})", re.IGNORECASE)
        quick = re.compile(spaced.lower())  # without edges, and so without looking at each letter
        for file in (file for file in files if quick.search(lowered[file])):
            text = texts[file]
            if prose_only and pattern.search(text):
                text = f"\n{prose(file, text.removeprefix(chr(10)))}"
            found += [
                f"{file}:{text.count(chr(10), 0, match.start())}: {match[0]!r}; write {instead}"
                for match in pattern.finditer(text)
            ]
    return found


@pytest.mark.parametrize(
    ("words", "patterns", "prose_only"),
    [(EVERYWHERE, (*PAGES, *CODE), False), (IN_PROSE, (*PAGES, *CODE), True), (IN_PAGES, PAGES, False)],
    ids=["everywhere", "prose", "pages"],
)
def test_the_text_has_no_house_words(words: dict[str, str], patterns: tuple[str, ...], prose_only: bool) -> None:
    assert not uses(words, _files(patterns), prose_only=prose_only)


def test_a_house_word_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("At most 2, so long that it waits.\nIt is made\nanew, at the\nmost 2 times.\n")
    assert [found.partition(f"{page}:")[2] for found in uses(EVERYWHERE, [page])] == [
        "3: 'at the\\nmost'; write at most",
        "3: 'anew'; write again",
    ]


def test_a_house_word_is_found_in_a_name(tmp_path: Path) -> None:
    module = tmp_path / "side_door.py"
    module.write_text("outdoors, told_at_start = 1, 2\nclass SideDoor: ...\n")
    assert [found.partition(str(tmp_path))[2] for found in uses(EVERYWHERE, [module])] == [
        "/side_door.py:1: 'told'; write asked, reported",
        "/side_door.py:0: 'door'; write entry point",
        "/side_door.py:2: 'Door'; write entry point",
    ]


def test_a_house_word_is_found_in_prose_alone(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('dear = "dear"  # a dear one\nbeside = f"{dear} is beside"\n"""First.\n\nSee\nwhoever."""\n')
    assert [found.partition(f"{module}:")[2] for found in uses(IN_PROSE, [module], prose_only=True)] == [
        "2: 'beside'; write next to, in addition to",
        "6: 'whoever'; write the reader, the writer",
        "1: 'dear'; write slow, expensive",
    ]
