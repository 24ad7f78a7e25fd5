"""The generated parts of the pages match the code, and the Chinese contents page matches the README.

Quick parts are generated again and compared. Tables that need runs or traces are checked for their form and for numbers
that add up; `python -m tests.docs.write` generates them again.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from configs.load import group_options
from tests.docs import axes, chinese, numbers
from tests.docs.messages import MARKED, messages, phrases, said
from tests.docs.write import COSTLY, MADE, QUICK, Part, make, pages, parts
from tests.support.parity import read_rows, render_table
from tests.test_docs import BLOCK, LINK, ROOT

PARTS = [part for page in pages() for part in parts(page)]
CHINESE = ROOT / "README.zh-CN.md"
CHAPTERS = {page.name for page in (ROOT / "docs").glob("*.md")}

TECHNIQUES = (
    "data-parallel",
    "zero-and-fsdp",
    "cpu-offload",
    "nvme-offload",
    "tensor-parallel",
    "pipeline",
    "combining",
    "long-sequences",
    "precision",
    "recompute",
    "fine-tuning",
)
TRANSLATED = (
    "what-fills-memory",
    "data-parallel",
    "zero-and-fsdp",
    "tensor-parallel",
    "pipeline",
    "combining",
    "precision",
    "fine-tuning",
    "choosing",
    "when-it-fails",
)
HEADINGS = ("What moves where", "The configuration", "Memory", "Parity", "What breaks", "Papers")


def _name(part: Part) -> str:
    return f"{part.page.parent.name}-{part.page.stem}-{part.name}-{' '.join(part.arguments)}"[:80]


def test_parts_were_found() -> None:
    """Every begin marker starts a part, and every function that generates a part is used."""
    begun = sum(page.read_text().count("<!-- made:") for page in pages())
    assert begun == len(PARTS) >= 90
    assert {part.name for part in PARTS} == {*QUICK, *COSTLY}
    assert all(part.text for part in PARTS), "a part was never made"


@pytest.mark.parametrize("part", [part for part in PARTS if part.quick], ids=_name)
def test_quick_parts_are_what_the_code_makes(part: Part) -> None:
    remedy = f"python -m tests.docs.write --quick {part.page.relative_to(ROOT)}"
    assert part.text == make(part), f"{part.page.name} is not up to date; {remedy}"


@pytest.mark.parametrize("part", [part for part in PARTS if not part.quick], ids=_name)
def test_costly_parts_have_their_form(part: Part) -> None:
    if part.name == "components":
        assert part.text == numbers.components()
    else:
        getattr(numbers, f"check_{part.name}")(*part.arguments, part.text)


@pytest.mark.parametrize(
    "page",
    [page for page in pages() if MARKED.search(page.read_text())],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_quoted_messages_are_those_of_the_code(page: Path) -> None:
    for message in messages(page):
        assert phrases(message), f"{page.name}: {message}: nothing in it could be compared"
        assert not [phrase for phrase in phrases(message) if phrase not in said()], message


def test_a_message_of_other_words_is_found() -> None:
    assert all(phrase in said() for phrase in phrases("FILE: expected 12 bytes, found 10"))
    assert not all(phrase in said() for phrase in phrases("FILE: expected 12 bytes, but found 10"))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_has_all_that_the_readme_promises(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    text = page.read_text()
    missing = [heading for heading in HEADINGS if f"\n## {heading}\n" not in text]
    assert not missing
    assert BLOCK.search(text), "no command"
    made = {part.name for part in PARTS if part.page == page}
    assert made >= {"difference", "memory", "refusal"}
    assert made & {"ranks", "drawing"}
    assert name == "nvme-offload" or "measured" in made  # its disk and host are only predicted
    assert "parity" in made or "tests/test_parity.py" in text


@pytest.mark.parametrize("page", sorted(chinese.FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_a_chinese_chapter_keeps_step_with_its_english_one(page: Path) -> None:
    """Commands, messages, tables, numbers and links agree, section by section."""
    assert not list(chinese.differences(page)), "\n".join(chinese.differences(page))


def test_a_chinese_chapter_that_says_otherwise_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chinese, "FOLDER", tmp_path / "zh")
    (tmp_path / "zh").mkdir()
    (tmp_path / "page.md").write_text("# Page\n\n8 ranks of `ddp`.\n\n| `a` | 2 bytes |\n| --- | --- |\n| `b` | 4 |\n")
    page = tmp_path / "zh" / "page.md"
    page.write_text("# 页\n\n`ddp` 的 8 个 rank。\n\n| `a` | 2 字节 |\n| --- | --- |\n| `b` | 4 |\n")
    assert not list(chinese.differences(page))
    for old, new in (("8", "16"), ("`ddp`", "`fsdp`"), ("2 字节", "3 字节"), ("| `b` | 4 |\n", "")):
        page.write_text(page.read_text().replace(old, new))
        assert len(list(chinese.differences(page))) == 1, new
        page.write_text(page.read_text().replace(new, old) if new else "")


def test_the_chinese_chapters_are_those_that_the_contents_name() -> None:
    named = {target for target in LINK.findall(CHINESE.read_text()) if target.startswith("docs/zh/")}
    assert (
        named
        == {f"docs/zh/{name}.md" for name in TRANSLATED}
        == {str(page.relative_to(ROOT)) for page in chinese.FOLDER.glob("*.md")}
    )


def test_the_drawing_of_five_axes_is_what_the_plan_gives() -> None:
    assert axes.FILE.read_text() == axes.svg(), "python -m tests.docs.axes"


def test_each_chapter_leads_to_the_next() -> None:
    contents = (ROOT / "README.md").read_text().split("## The cookbook")[1].split("\n## ")[0]
    order = re.findall(r"^\| \[[^]]*\]\(docs/([^)]*)\)", contents, re.MULTILINE)
    assert len(order) > 20
    for page, following in pairwise(order):
        last = (ROOT / "docs" / page).read_text().rstrip().splitlines()[-1]
        assert last.startswith("Next: ") and LINK.findall(last) == [following], page


def test_the_parity_page_is_as_it_is_written() -> None:
    """Everything but the numbers and the versions is rendered again and compared."""
    page = (ROOT / "docs" / "parity.md").read_text()
    rows = read_rows(page)
    assert len(rows) > 150
    written = render_table(rows)
    assert [line for line in page.splitlines() if not line.startswith("Last written")] == [
        line for line in written.splitlines() if not line.startswith("Last written")
    ]


def test_what_stage_2_and_stage_3_partition() -> None:
    """The sentences of docs/zero-and-fsdp.md about its table agree with the table's numbers."""
    table = next(part.text for part in PARTS if part.name == "holding")
    rows = {line.split("`")[1]: [float(cell) for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]}
    before = {name: row[:2] for name, row in rows.items()}
    between = {name: row[2:4] for name, row in rows.items()}
    accumulating = {name: row[4:] for name, row in rows.items()}
    assert before["parallel=zero1"] == before["parallel=zero2"], "stage 2 partitions no more of the parameters"
    assert all(size >= 4 for size in before["parallel=zero2"]), "stage 2 holds whole parameters"
    assert before["parallel=fsdp"] == [2.0, 1.0], "a shard of the parameters and nothing else"
    for name in ("zero1", "zero2", "zero3", "fsdp"):
        two, four = (b - a for a, b in zip(before[f"parallel={name}"], between[f"parallel={name}"], strict=True))
        assert (two, four) == pytest.approx((4, 2), abs=0.11), f"{name} partitions the 8 bytes of optimizer states"
    gradients = {name: [a - b for a, b in zip(accumulating[name], between[name], strict=True)] for name in rows}
    assert gradients["parallel=zero1"] == pytest.approx([8, 8], abs=0.11), "whole, and the bucket they are sent from"
    assert gradients["parallel=zero2"] == pytest.approx([2, 1], abs=0.2), "partitioned"


def test_every_chapter_is_in_both_contents() -> None:
    for page in (ROOT / "README.md", CHINESE):
        linked = {Path(target).name for target in LINK.findall(page.read_text()) if target.startswith("docs/")}
        assert linked >= CHAPTERS, page.name
    options = group_options()["parallel"]
    assert set(re.findall(r"`(\w+)`", next(part.text for part in PARTS if part.name == "matrix"))) >= set(options)


def test_the_chinese_page_has_the_commands_of_the_readme() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", CHINESE.name))
    assert BLOCK.findall(chinese) == BLOCK.findall(english)
    first = re.compile(r"^    (bash \S+)", re.MULTILINE)
    assert first.findall(chinese) == first.findall(english) == ["bash launch/demo.sh", "bash tests/run.sh"]


def test_the_chinese_page_leads_somewhere() -> None:
    targets = [target for target in LINK.findall(CHINESE.read_text()) if "://" not in target]
    assert len(targets) > 20
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_anchors_lead_to_headings() -> None:
    pattern = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
    found = 0
    for page in [*pages(), CHINESE]:
        for target, anchor in pattern.findall(page.read_text()):
            if "://" in target:
                continue
            text = (page.parent / target).read_text() if target else page.read_text()
            slugs = {_slug(line) for line in MADE.sub("", text).splitlines() if line.startswith("#")}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"
            found += 1
    assert found > 5


def _slug(heading: str) -> str:
    """Returns the anchor that GitHub gives the heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lstrip("# ").strip().lower())
    return kept.replace(" ", "-")
