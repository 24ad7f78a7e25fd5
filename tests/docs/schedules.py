"""Pipeline schedules as a page on which ranks, micro-batches and stages are moved, and as drawings for GitHub.

    python -m tests.docs.schedules      docs/figures/schedules.html, docs/figures/schedule-NAME.svg

Every action and its time come from the trainer's own orders, played by its own `timeline`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.axes.pipeline.orders import rank_orders
from trainer.axes.pipeline.table import SCHEDULES, check_pipeline, default_stages_per_rank, stages_of_rank
from trainer.axes.pipeline.timeline import DURATION, Slot, bubble_fraction, in_flight, timeline
from trainer.html import page

FOLDER = Path(__file__).parents[2] / "docs" / "figures"
RANKS, MICRO_BATCHES, STAGES = (2, 3, 4, 6, 8), (1, 2, 4, 6, 8, 12, 16), (1, 2, 3, 4)
COLOURS = {"F": "#4e79a7", "B": "#f28e2b", "I": "#f28e2b", "W": "#59a14f"}
NAMES = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
SOURCES = Path(__file__).parent
DRAWN = (4, 8)
"""Ranks and micro-batches of the drawings."""
ROW, GAP, LEFT = 22, 4, 52
UNIT = {1: 14, 2: 22}
"""Width of a forward of all stages of a rank."""


def play(schedule: str, pp: int, micro_batches: int, stages: int) -> list[list[Slot]]:
    orders = rank_orders(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages)
    return timeline(schedule, orders, [1.0] * (pp * stages))


def case(schedule: str, pp: int, micro_batches: int, stages: int) -> dict[str, object]:
    """One combination: what the rules say against it, or its actions and what follows from them."""
    problems = list(
        check_pipeline(
            pp=pp, schedule=schedule, micro_batches=micro_batches, stages_per_rank=stages, num_layers=pp * stages
        )
    )
    if problems:
        return {"refused": problems}
    peaks = in_flight(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages)
    waits = bubble_fraction(schedule, pp=pp, micro_batches=micro_batches, stages_per_rank=stages)
    return {
        "rows": [
            _row(schedule, row, pp, rank, stages) for rank, row in enumerate(play(schedule, pp, micro_batches, stages))
        ],
        "waits": round(1000 * waits),
        "held": [sum(peak.values()) for peak in peaks],
    }


def _row(schedule: str, row: list[Slot], pp: int, rank: int, stages: int) -> str:
    """Five characters for an action: its kind, which of the rank's stages, the micro-batch, and, of two, the forwards
    for which it waits before."""
    own, end, text = stages_of_rank(schedule, pp=pp, rank=rank, stages_per_rank=stages), 0.0, ""
    for action, begin, until in row:
        places = (own.index(action.stage), action.micro_batch, round(begin - end))
        text += action.kind + "".join(DIGITS[place] for place in places[:2]) + _wait(places[2])
        end = until
    return text


def _wait(number: int) -> str:
    assert number < len(DIGITS) ** 2
    return DIGITS[number // len(DIGITS)] + DIGITS[number % len(DIGITS)]


def _cases() -> Iterator[tuple[str, dict[str, object]]]:
    for schedule in SCHEDULES:
        for stages in STAGES:
            for pp in RANKS:
                for micro_batches in MICRO_BATCHES:
                    yield f"{schedule} {pp} {micro_batches} {stages}", case(schedule, pp, micro_batches, stages)


def html() -> str:
    data = {
        "cases": dict(_cases()),
        "schedules": {name: default_stages_per_rank(name) for name in SCHEDULES},
        "sliders": {"ranks": RANKS, "micro-batches": MICRO_BATCHES, "stages per rank": STAGES},
        "durations": DURATION,
        "colours": COLOURS,
        "names": NAMES,
    }
    body, style, script = ((SOURCES / f"schedules.{kind}").read_text() for kind in ("html", "css", "js"))
    return page("Pipeline schedules", body, style=style, script=script, data=data)


def svg(schedule: str) -> str:
    """One schedule at the sizes of `DRAWN`, as it is without a script."""
    pp, micro_batches = DRAWN
    stages = default_stages_per_rank(schedule)
    rows = play(schedule, pp, micro_batches, stages)
    unit = UNIT[stages] / stages
    width = LEFT + unit * max(row[-1].end for row in rows) + 2
    shapes: list[str] = []
    for rank, row in enumerate(rows):
        top = rank * (ROW + GAP)
        shapes.append(f'<text class="rank" x="0" y="{top + 15}">rank {rank}</text>')
        own = stages_of_rank(schedule, pp=pp, rank=rank, stages_per_rank=stages)
        for (kind, stage, number), begin, end in row:
            left, size = LEFT + begin * unit, (end - begin) * unit
            pale = 1 - 0.35 * own.index(stage) / max(1, stages - 1)
            shapes.append(
                f'<rect x="{left:.1f}" y="{top}" width="{size - 0.8:.1f}" height="{ROW}" fill="{COLOURS[kind]}"'
                f' fill-opacity="{pale:.2f}"><title>{NAMES[kind]}, micro-batch {number}, stage {stage}</title></rect>'
            )
            if size > 8:
                ink = "" if kind == "F" else ' class="dark"'
                shapes.append(f'<text{ink} x="{left + size / 2 - 0.4:.1f}" y="{top + 15}">{number}</text>')
    height = pp * (ROW + GAP)
    style = (
        "text{font:10px sans-serif;fill:#fff;text-anchor:middle}.dark{fill:#14171c}"
        ".rank{font-size:12px;fill:#59616d;text-anchor:start}"
        "@media(prefers-color-scheme:dark){.rank{fill:#a3acb9}}"
    )
    label = f"{schedule}: {pp} ranks, {micro_batches} micro-batches"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img"'
        f' aria-label="{label}"><style>{style}</style>{"".join(shapes)}</svg>\n'
    )


def made() -> dict[str, str]:
    """The text of each file."""
    return {"schedules.html": html(), **{f"schedule-{name}.svg": svg(name) for name in SCHEDULES}}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in made().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name, len(text))
