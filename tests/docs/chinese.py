"""The Chinese chapters in docs/zh/, held against the English pages that they translate.

A translation has the sections of its page in the same order. Each section has the same code, the same made parts, the
same tables (row for row: numbers and what stands between backticks), and in its text the same numbers, code and links.
A link leads to the Chinese chapter if there is one. `tests.docs.write` copies made parts from the English page.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "zh"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)?(#[^)\s]*)?\)")
MADE = re.compile(r"<!-- made: .*?<!-- end -->", re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
CODE = re.compile(r"`[^`]+`")
NUMBER = re.compile(r"\d(?:[\d,.]*\d)?")
PAPERS = re.compile(r"^- .+(?:\n  .+)*", re.MULTILINE)


def is_chinese(page: Path) -> bool:
    return page.parent == FOLDER


def english(page: Path) -> Path:
    """The page that a Chinese one translates."""
    return FOLDER.parent / page.name


def moved(text: str) -> str:
    """A made part of a page in docs/, with the links that it needs in docs/zh/."""

    def link(found: re.Match[str]) -> str:
        target = found[2]
        if target is None or "://" in target:
            return found[0]
        return f"{found[1]}{os.path.relpath(_translated(FOLDER.parent / target), FOLDER)}{found[3] or ''})"

    return LINK.sub(link, text)


def _translated(target: Path) -> Path:
    target = Path(os.path.normpath(target))
    own = FOLDER / target.name
    return own if target.parent == FOLDER.parent and own.exists() else target


@dataclass(frozen=True)
class Section:
    """What both languages share of a section. `heading` is for messages."""

    heading: str
    shared: dict[str, object]


def sections(page: Path) -> Iterator[Section]:
    text = page.read_text()
    kept = [found[0] for pattern in (MADE, FENCE) for found in pattern.finditer(text)]
    for number, block in enumerate(kept):
        text = text.replace(block, f"@{number}@", 1)
    for part in re.split(r"^(?=#+ )", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        blocks = [kept[int(found)] for found in re.findall(r"@(\d+)@", body)]
        body = re.sub(r"@\d+@", "", body)
        indented = INDENTED.findall(body)
        rows = ROW.findall(INDENTED.sub("", body))
        prose = ROW.sub("", INDENTED.sub("", body))
        papers = PAPERS.findall(prose) if "arXiv:" in prose and heading in ("## Papers", "## 论文") else []
        yield Section(
            heading,
            {
                "level": len(heading) - len(heading.lstrip("#")),
                "blocks": blocks if is_chinese(page) else [_moved_block(block) for block in blocks],
                "indented code": indented,
                "rows of tables": [_facts(row, page) for row in rows],
                "papers": papers,
                "text": {} if papers else _facts(prose, page),
            },
        )


def _moved_block(block: str) -> str:
    if block.startswith("```"):
        return block
    marker, _, text = block.partition("\n")
    return f"{marker}\n{moved(text)}"


def _facts(text: str, page: Path) -> dict[str, dict[str, int]]:
    """Numbers, code and links of a text, each with how often it stands there."""
    links = [
        os.path.relpath(_translated(page.parent / found[2]), ROOT) if "://" not in found[2] else found[2]
        for found in LINK.finditer(text)
        if found[2]
    ]
    bare = LINK.sub(lambda found: found[1], text)
    code = [" ".join(found.split()) for found in CODE.findall(bare)]
    numbers = NUMBER.findall(re.sub(r"<!--.*?-->", "", CODE.sub("", bare)))
    return {"code": dict(Counter(code)), "numbers": dict(Counter(numbers)), "links": dict(Counter(links))}


def differences(page: Path) -> Iterator[str]:
    """Where a Chinese page lacks what its English one has, or has more."""
    theirs, ours = list(sections(english(page))), list(sections(page))
    if len(theirs) != len(ours):
        yield f"{len(theirs)} sections in docs/{page.name}, {len(ours)} in docs/zh/{page.name}"
        return
    for there, here in zip(theirs, ours, strict=True):
        for kind, expected in there.shared.items():
            if here.shared[kind] != expected:
                yield f"{there.heading} ({here.heading}), {kind}:\n{_difference(expected, here.shared[kind])}"


def _difference(expected: Any, found: Any) -> str:
    """The first thing that differs."""
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return f"  {len(expected)} in English, {len(found)} in Chinese"
        expected, found = next((a, b) for a, b in zip(expected, found, strict=True) if a != b)
    if isinstance(expected, dict):
        lines: list[str] = []
        for key in expected:
            a, b = Counter(expected[key]), Counter(found[key])
            lines += [f"  {key}: only in English {dict(a - b)}, only in Chinese {dict(b - a)}"] if a != b else []
        return "\n".join(lines)
    return f"  English: {str(expected)[:400]}\n  Chinese: {str(found)[:400]}"
