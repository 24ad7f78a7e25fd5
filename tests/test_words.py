"""House words that the text of this project no longer has, each with the word of the field that stands for it.

The list grows folder by folder: a word is added here when it has left the folders that it is forbidden in.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    r"(is|are|was|were|been|being) told": "asked, reported, known",
}
IN_PAGES = {
    r"told": "asked, reported",
    r"doors?": "entry point",
    r"beside": "next to",
    r"words": "overrides, vocabulary entries",
    r"(loss|gradients?|parameters|norm|%|MiB \|) apart": "difference",
}


def _files(patterns: tuple[str, ...]) -> list[Path]:
    found = {file for pattern in patterns for file in ROOT.glob(pattern) if file.suffix in TEXT}
    return sorted(found - {Path(__file__)})


def uses(words: dict[str, str], files: list[Path]) -> list[str]:
    """Each use of a banned word: where it stands, and the word for it. It may be broken over two lines."""
    found: list[str] = []
    for word, instead in words.items():
        pattern = re.compile(rf"(?<!\w){word}(?!\w)".replace(" ", r"[\s#]+"), re.IGNORECASE)
        for file in files:
            text = file.read_text()
            found += [
                f"{file}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write {instead}"
                for match in pattern.finditer(text)
            ]
    return found


@pytest.mark.parametrize(
    ("words", "patterns"),
    [(EVERYWHERE, (*PAGES, *CODE)), (IN_PAGES, PAGES)],
    ids=["everywhere", "pages"],
)
def test_the_text_has_no_house_words(words: dict[str, str], patterns: tuple[str, ...]) -> None:
    assert not uses(words, _files(patterns))


def test_a_house_word_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("At most 2, so long that it waits.\nIt is made\nanew, at the\nmost 2 times.\n")
    assert [found.partition(f"{page}:")[2] for found in uses(EVERYWHERE, [page])] == [
        "3: 'at the\\nmost'; write at most",
        "3: 'anew'; write again",
    ]
