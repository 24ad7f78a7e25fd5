"""ZeRO's stages as a page on which a step runs, and as a drawing for GitHub.

    python -m tests.docs.stages      docs/figures/zero.html, docs/figures/zero-stages.svg

Bytes, seconds and order are those of `stage_step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tests.docs.stage_step import SHOWN, STAGES, Work, gpu, highest, length, step, waiting
from trainer.html import page

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
SOURCES = Path(__file__).parent
RANKS, LAYERS, TOKENS = (2, 4, 8, 16, 64), (4, 8, 16, 32), (1024, 4096)
DRAWN = (8, 8, 4096)
"""Ranks, layers and tokens of the drawing."""
COLOURS = {"F": "#4e79a7", "B": "#f28e2b", "U": "#59a14f", "G": "#76b7b2", "R": "#e15759", "P": "#76b7b2"}
NAMES = {
    "F": "forward",
    "B": "backward",
    "U": "update",
    "G": "gather parameters",
    "R": "reduce gradients",
    "P": "gather updated parameters",
}
PARTS = dict(zip(SHOWN, ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1"), strict=True))
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
TICK, MIB, GIB = 1e-4, 2**20, 2**30
TITLES = {"0": "stage 0: data parallel", "1": "stage 1", "2": "stage 2", "3": "stage 3", "FSDP": "FSDP"}
LEFT, LANE, GAP, BLOCK, WIDTH = 150, 18, 3, 66, 860


def case(stage: str, ranks: int, layers: int, tokens: int) -> dict[str, object]:
    works = step(stage, ranks, layers, tokens)
    return {
        "works": "".join(_written(work) for work in works),
        "held": "".join(_number(size // MIB, 4) for work in works for size in work.held),
        "waits": round(1000 * waiting(works)),
    }


def _written(work: Work) -> str:
    """Eight characters: its kind, its group, its begin and its end in ticks."""
    return work.kind + DIGITS[work.group] + _number(round(work.begin / TICK), 3) + _number(round(work.end / TICK), 3)


def _number(value: int, digits: int) -> str:
    text = ""
    for _ in range(digits):
        value, last = divmod(value, len(DIGITS))
        text = DIGITS[last] + text
    assert value == 0
    return text


def html() -> str:
    wanted = product(STAGES, RANKS, LAYERS, TOKENS)
    data = {
        "cases": {" ".join(map(str, each)): case(*each) for each in wanted},
        "sliders": {"stage": [*STAGES], "ranks": RANKS, "layers": LAYERS, "tokens of a micro-batch": TOKENS},
        "titles": TITLES,
        "colours": COLOURS,
        "names": NAMES,
        "parts": PARTS,
        "capacity": gpu().memory_bytes / GIB,
        "tick": TICK * 1000,
    }
    body, style, script = ((SOURCES / f"stages.{kind}").read_text() for kind in ("html", "css", "js"))
    return page("ZeRO, stage by stage", body, style=style, script=script, data=data)


def svg() -> str:
    """All stages below each other at the sizes of `DRAWN`."""
    found = {stage: step(stage, *DRAWN) for stage in STAGES}
    unit = (WIDTH - LEFT) / max(map(length, found.values()))
    shapes = [
        shape for place, (stage, works) in enumerate(found.items()) for shape in _block(stage, works, place, unit)
    ]
    shapes += _legend(len(found) * BLOCK + 6)
    style = "text{font:12px sans-serif;fill:#59616d}.strong{font-weight:600}.lane{fill:#8a94a3;fill-opacity:.15}"
    style += "@media(prefers-color-scheme:dark){text{fill:#a3acb9}}"
    ranks, layers, tokens = DRAWN
    label = f"A step of each ZeRO stage: {ranks} ranks, {layers} layers, {tokens} tokens per rank"
    height = len(found) * BLOCK + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img"'
        f' aria-label="{label}"><style>{style}</style>{"".join(shapes)}</svg>\n'
    )


def _block(stage: str, works: list[Work], place: int, unit: float) -> Iterator[str]:
    top = place * BLOCK + 2
    parts = [f"{name} {size / GIB:.1f}" for name, size in zip(SHOWN, highest(works), strict=True)]
    ends = length(works)
    said = f"{ends * 1000:.0f} ms, of which the GPU waits {waiting(works):.0%}; GiB: {', '.join(parts)}"
    yield f'<text class="strong" x="0" y="{top + 11}">{TITLES[stage]}</text>'
    yield f'<text x="{LEFT}" y="{top + 11}">{said}</text>'
    for lane, name in enumerate(("computation", "communication")):
        y = top + 16 + lane * (LANE + GAP)
        yield f'<text x="20" y="{y + 13}">{name}</text>'
        yield f'<rect class="lane" x="{LEFT}" y="{y}" width="{ends * unit:.1f}" height="{LANE}"/>'
        for work in works:
            if work.computes is (lane == 0) and work.end - work.begin > 1e-5:
                x, width = LEFT + work.begin * unit, max(0.5, (work.end - work.begin) * unit - 0.6)
                yield (
                    f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{LANE}" fill="{COLOURS[work.kind]}">'
                    f"<title>{NAMES[work.kind]}</title></rect>"
                )


def _legend(top: int) -> Iterator[str]:
    x = LEFT
    for kind in "FBUGR":
        yield f'<rect x="{x}" y="{top}" width="10" height="10" fill="{COLOURS[kind]}"/>'
        yield f'<text x="{x + 15}" y="{top + 10}">{NAMES[kind]}</text>'
        x += 40 + 7 * len(NAMES[kind])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in {"zero.html": html(), "zero-stages.svg": svg()}.items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name, len(text))
