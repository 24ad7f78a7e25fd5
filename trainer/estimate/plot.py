"""The memory of a step as a picture: stacked components over time, or one bar for each configuration of a sweep.

FILE.html holds an SVG and needs nothing; FILE.png is drawn by matplotlib (pip install matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, EnvironmentProblem
from trainer.estimate.render import Answer, own_words
from trainer.estimate.timeline import COMPONENTS

GIB = 2**30
COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 420, 60, 60, 30

Column = tuple[str, tuple[int, ...]]
"""Label and bytes of each component."""


def save_plot(answers: Sequence[Answer], file: str) -> None:
    """Draw one configuration's step, or a sweep's comparison. Raises ConfigError for another kind of file and
    EnvironmentProblem when it cannot be written."""
    path = Path(file).expanduser()
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"estimate.plot={file}: draws .html or .png; name the file so")
    capacity = answers[0].estimate.device.capacity_bytes
    columns = _columns(answers)
    try:
        if path.suffix == ".png":
            _save_png(columns, capacity, path, description=_description(answers))
        else:
            path.write_text(_html(columns, capacity))
    except OSError as error:
        raise EnvironmentProblem(f"estimate.plot={file}: cannot be written: {error.strerror}") from None


def _columns(answers: Sequence[Answer]) -> list[Column]:
    if len(answers) == 1:
        curve = answers[0].estimate.busiest.curve
        return [(f"{moment.phase}, step {moment.step}", moment.parts) for moment in curve]
    labels = own_words(answers)
    return [
        (label, tuple(one.estimate.busiest.components.values())) for label, one in zip(labels, answers, strict=True)
    ]


def _description(answers: Sequence[Answer]) -> str:
    """What a picture is of, written into the file: it can be held against today's numbers wherever it was put."""
    return "; ".join(f"{' '.join(one.overrides)}: {one.estimate.busiest.peak_allocated_bytes} bytes" for one in answers)


def _save_png(columns: list[Column], capacity: int | None, path: Path, *, description: str) -> None:
    try:
        figure_module: Any = import_module("matplotlib.figure")
    except ImportError:
        raise EnvironmentProblem(
            f"estimate.plot={path}: PNG needs matplotlib (pip install matplotlib); or use a file named .html"
        ) from None
    figure = figure_module.Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    base = [0.0] * len(columns)
    for index, (name, colour) in enumerate(zip(COMPONENTS, COLOURS, strict=True)):
        sizes = [parts[index] / GIB for _, parts in columns]
        axes.bar(range(len(columns)), sizes, bottom=base, width=1.0, label=name, color=colour)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    if capacity is not None:
        axes.axhline(capacity / GIB, color="black", linestyle="--", label="device")
    marks = _marks(columns)
    axes.set_xticks([at for at, _ in marks], [text for _, text in marks], rotation=30, ha="right")
    axes.set_ylabel("GiB allocated")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, metadata={"Description": description})


def _marks(columns: list[Column]) -> list[tuple[int, str]]:
    """A label in the middle of each run of columns that share it: at their beginnings two would overlap where one
    of them is short."""
    labels = [label for label, _ in columns]
    begins = [at for at, label in enumerate(labels) if at == 0 or labels[at - 1] != label]
    ends = [*begins[1:], len(labels)]
    return [((begin + end - 1) // 2, labels[begin]) for begin, end in zip(begins, ends, strict=True)]


def _html(columns: list[Column], capacity: int | None) -> str:
    top = max([sum(parts) for _, parts in columns] + [capacity or 0]) or 1
    step = (WIDTH - LEFT) / len(columns)
    scale = (HEIGHT - BOTTOM - TOP) / top
    floor = HEIGHT - BOTTOM
    shapes: list[str] = []
    for at, (label, parts) in enumerate(columns):
        y = float(floor)
        for name, colour, size in zip(COMPONENTS, COLOURS, parts, strict=True):
            if size:
                y -= size * scale
                shapes.append(
                    f'<rect x="{LEFT + at * step:.1f}" y="{y:.1f}" width="{step:.2f}" height="{size * scale:.2f}"'
                    f' fill="{colour}"><title>{escape(label)}: {name} {size / GIB:.3f} GiB</title></rect>'
                )
    for at, label in _marks(columns):
        shapes.append(
            f'<text x="{LEFT + at * step:.1f}" y="{floor + 14}" font-size="10"'
            f' transform="rotate(20 {LEFT + at * step:.1f} {floor + 14})">{escape(label)}</text>'
        )
    lines = [(top / GIB * part / 4, floor - top * scale * part / 4, "#ccc") for part in range(5)]
    if capacity is not None:
        lines.append((capacity / GIB, floor - capacity * scale, "#000"))
    for value, y, colour in lines:
        shapes.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>')
        shapes.append(f'<text x="4" y="{y + 4:.1f}" font-size="11">{value:.2f} GiB</text>')
    legend = " ".join(
        f'<span style="color:{colour}">&#9632;</span> {name}' for name, colour in zip(COMPONENTS, COLOURS, strict=True)
    )
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 60}" width="{WIDTH}">{"".join(shapes)}</svg>'
    return f"<!doctype html><meta charset=utf-8><title>memory</title><body>{picture}<p>{legend}</p></body>\n"
