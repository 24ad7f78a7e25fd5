"""Curves over the steps of a run, as SVG: they scale with the page and follow its colours.

    draw("loss", [Series("training", {1: 5.6, 2: 5.4}), Series("validation", {0: 5.7}, dots=True)])

In a long run each point of the line is the mean of neighbouring steps, and a pale band reaches from their minimum to
their maximum, so that a spike of one step stays visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from trainer.html import COLOURS, ticks

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 46, 28
PLACES = 300
TICKS = 4
STYLE = """\
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 1em; }
.curves svg { width: 100%; } svg text { fill: currentColor; font-size: 12px; } .tick { stroke: var(--line); }"""


@dataclass(frozen=True, slots=True)
class Series:
    """values: by step."""

    name: str
    values: Mapping[int, float]
    dots: bool = False


def draw(title: str, series: Sequence[Series]) -> str:
    """One picture; empty if there are no values."""
    series = [each for each in series if each.values]
    if not series:
        return ""
    x = _Scale([step for each in series for step in each.values], LEFT, WIDTH - RIGHT)
    y = _Scale([value for each in series for value in each.values.values()], HEIGHT - BOTTOM, TOP)
    shapes = [f'<text x="4" y="16" font-weight="bold">{escape(title)}</text>']
    for value in ticks(y.low, y.high, TICKS):
        shapes.append(f'<line class="tick" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        shapes.append(f'<text x="{LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    whole = [step for step in ticks(x.low, x.high, TICKS) if step == int(step)]
    shapes += [f'<text x="{x(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:,.0f}</text>' for step in whole]
    for number, each in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        shapes += _dots(each, x, y, colour) if each.dots else _line(each, x, y, colour)
        last = each.values[max(each.values)]
        place = LEFT + number * (WIDTH - LEFT) / len(series)
        shapes.append(
            f'<text x="{place:.0f}" y="34"><tspan fill="{colour}">&#9632;</tspan> {escape(each.name)}:'
            f" {_short(last)} at last</text>"
        )
    label = f"{title} over {len(series[0].values)} steps"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(shapes)}</svg>'


class _Scale:
    """From values to coordinates in the picture."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        if begin < end and low < high:
            room = 0.0  # steps reach from edge to edge
        self.low, self.high = low - room, high + room
        self._begin, self._scale = begin, (end - begin) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) * self._scale


def _line(series: Series, x: _Scale, y: _Scale, colour: str) -> list[str]:
    points = sorted(series.values.items())
    if len(points) == 1:
        return _dots(series, x, y, colour)
    shapes: list[str] = []
    if len(points) > 2 * PLACES:
        size = -(-len(points) // PLACES)
        parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
        steps = [sum(step for step, _ in part) / len(part) for part in parts]
        edges = [(min(value for _, value in part), max(value for _, value in part)) for part in parts]
        outline = [(step, high) for step, (_, high) in zip(steps, edges, strict=True)]
        outline += [(step, low) for step, (low, _) in reversed([*zip(steps, edges, strict=True)])]
        shapes.append(f'<polygon points="{_places(outline, x, y)}" fill="{colour}" fill-opacity="0.25"/>')
        means = [sum(value for _, value in part) / len(part) for part in parts]
        line: Sequence[tuple[float, float]] = [*zip(steps, means, strict=True)]
    else:
        line = points
    drawn = f'<polyline points="{_places(line, x, y)}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    return [*shapes, drawn]


def _dots(series: Series, x: _Scale, y: _Scale, colour: str) -> list[str]:
    return [
        f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}">'
        f"<title>step {step}: {value:.6g}</title></circle>"
        for step, value in sorted(series.values.items())
    ]


def _places(points: Sequence[tuple[float, float]], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
