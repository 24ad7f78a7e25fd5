"""Model types of transformers behave under layouts as docs/models.md says. Each change tests a seeded sample; nightly
runs test all types."""

from __future__ import annotations

from random import Random

import pytest

from tests.zoo.judge import LAYOUTS, Verdict, visit
from tests.zoo.table import PAGE, is_equal, read
from tests.zoo.tiny import types

SAMPLE = 2
ALWAYS = [
    ("jetmoe", "ddp"),
    ("zamba", "fsdp"),
    ("xlstm", "single"),
    ("bart", "zero3"),
    ("rwkv", "pipeline"),
    ("mllama", "sequence"),
    ("reformer", "lora"),
    ("minimax", "memory"),
    ("starcoder2", "fsdp's memory"),
]
"""Each of these had its own bug once."""
ROWS = read(PAGE.read_text())


def drawn() -> list[tuple[str, str]]:
    random = Random(16)
    some = random.sample(sorted(ROWS), SAMPLE)
    chosen = [(name, random.choice([layout for layout, cell in ROWS[name].items() if cell])) for name in some]
    return list(dict.fromkeys([*ALWAYS, *chosen]))


def test_the_page_has_every_type() -> None:
    page = PAGE.read_text()
    assert not [name for name in types() if name not in ROWS and f"- {name}: " not in page]


@pytest.mark.parametrize(("name", "layout"), drawn())
def test_a_sample_is_as_the_page_says(name: str, layout: str) -> None:
    check(name, [layout])


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_type_is_as_the_page_says(name: str) -> None:
    check(name, [layout for layout in LAYOUTS if ROWS[name][layout]])


def check(name: str, layouts: list[str]) -> None:
    known: dict[str, Verdict] = {}
    assert [*visit(name, layouts, known)] == layouts
    found = {layout: ("equal" if one["verdict"] == "ok" else one["verdict"]) for layout, one in known.items()}
    wanted = {one: ("equal" if is_equal(ROWS[name][one]) else ROWS[name][one]) for one in layouts}
    assert found == wanted, known
