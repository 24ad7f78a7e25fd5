"""The memory of a step as a picture: stacked components over time, or one bar for each configuration of a sweep.

Lines above the components of one configuration show the memory that torch's allocator has reserved, the total with CUDA
context and NCCL (a band, since both are ranges), and the device. In a sweep the first two are parts of the
bars, at their lower ends.

FILE.html holds an SVG and loads nothing else; FILE.png is drawn by matplotlib (pip install matplotlib).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, EnvironmentProblem
from trainer.estimate.render import Answer, common_overrides, own_overrides
from trainer.estimate.timeline import COMPONENTS
from trainer.html import COLOURS, page, ticks

GIB = 2**30
BEYOND = {"reserved, not in use": "#d9d9d9", "CUDA context, NCCL": "#8c8c8c"}
"""Memory on the device outside the components, in a sweep's bars."""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 420, 60, 60, 20
TICKS = 6
STYLE = """\
h1 { font-size: 1.05em; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .wide svg { max-width: none; }
svg text { fill: currentColor; paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
.entry { white-space: nowrap; } :focus-visible { outline: 3px solid var(--accent); }"""
"""A narrow screen shows a part of the drawing, at its own size."""

Column = tuple[str, tuple[int, ...]]
"""Label and bytes of each component; in a sweep also of what BEYOND names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """lines: (text, bytes) over the whole width, from below. band: the range on the device, of one configuration."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[tuple[str, int]]
    band: tuple[int, int] | None

    @property
    def parts(self) -> dict[str, str]:
        """What the columns are made of, with its colour."""
        known = dict[str, str](zip(COMPONENTS, COLOURS, strict=True))
        return known if len(self.columns[0][1]) == len(known) else known | BEYOND

    @property
    def top(self) -> int:
        return max([sum(parts) for _, parts in self.columns] + [size for _, size in self.lines]) or 1


def save_plot(answers: Sequence[Answer], file: str) -> None:
    """Draw one configuration's step, or a sweep's comparison. Raises ConfigError for another kind of file and
    EnvironmentProblem when it cannot be written."""
    path = Path(file).expanduser()
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"estimate.plot={file}: draws .html or .png; name the file so")
    picture = _picture(answers)
    try:
        if path.suffix == ".png":
            _save_png(picture, path, description=_description(answers))
        else:
            path.write_text(_html(picture))
    except OSError as error:
        raise EnvironmentProblem(f"estimate.plot={file}: cannot be written: {error.strerror}") from None


def _picture(answers: Sequence[Answer]) -> Picture:
    found = answers[0].estimate
    rank, capacity = found.busiest, found.device.capacity_bytes
    device = [] if capacity is None else [(f"{found.device.name}: {capacity / GIB:.1f} GiB", capacity)]
    if len(answers) > 1:
        columns = [(label, _bar(one)) for label, one in zip(own_overrides(answers), answers, strict=True)]
        title = _title("Peak of one GPU", common_overrides(answers))
        return Picture(title=title, columns=columns, lines=device, band=None)
    columns = [(f"{moment.phase}, step {moment.step}", moment.parts) for moment in rank.curve]
    title = _title("Two steps of one GPU" if capacity else "Two steps of one process", answers[0].overrides)
    if capacity is None:
        return Picture(title=title, columns=columns, lines=[], band=None)
    lower, upper = rank.device_bytes, rank.device_most_bytes
    lines = [
        (f"reserved by torch: {rank.peak_reserved_bytes / GIB:.1f}", rank.peak_reserved_bytes),
        (f"with context and NCCL: {lower / GIB:.1f} to {upper / GIB:.1f}", lower),
    ]
    return Picture(title=title, columns=columns, lines=[*lines, *device], band=(lower, upper))


def _title(what: str, overrides: Sequence[str]) -> str:
    own = [word for word in overrides if not word.startswith(("estimate.", "data.cache_dir="))]
    return f"{what}: {' '.join(own)}" if own else what


def _bar(answer: Answer) -> tuple[int, ...]:
    found, rank = answer.estimate, answer.estimate.busiest
    unused = max(0, rank.peak_reserved_bytes - rank.peak_allocated_bytes)
    return (*rank.components.values(), unused, found.context_bytes + found.nccl_bytes)


def _description(answers: Sequence[Answer]) -> str:
    """What a picture is of, written into the file: it can be held against today's numbers wherever it was put."""
    return "; ".join(f"{' '.join(one.overrides)}: {one.estimate.busiest.peak_allocated_bytes} bytes" for one in answers)


def _save_png(picture: Picture, path: Path, *, description: str) -> None:
    try:
        figure_module: Any = import_module("matplotlib.figure")
    except ImportError:
        raise EnvironmentProblem(
            f"estimate.plot={path}: PNG needs matplotlib (pip install matplotlib); or use a file named .html"
        ) from None
    figure = figure_module.Figure(figsize=(10, 5), layout="constrained")
    axes, columns = figure.add_subplot(), picture.columns
    base = [0.0] * len(columns)
    for index, (name, colour) in enumerate(picture.parts.items()):
        sizes = [parts[index] / GIB for _, parts in columns]
        axes.bar(range(len(columns)), sizes, bottom=base, width=1.0, label=name, color=colour)
        base = [a + b for a, b in zip(base, sizes, strict=True)]
    if picture.band is not None:
        axes.axhspan(*(size / GIB for size in picture.band), color="#bbbbbb", alpha=0.4, linewidth=0)
    for (text, size), style in zip(reversed(picture.lines), ("--", "-", ":"), strict=False):
        axes.axhline(size / GIB, color="black", linestyle=style, linewidth=1, label=text)
    axes.set_yticks(ticks(0, picture.top / GIB, TICKS))
    axes.set_title(picture.title, fontsize="small", wrap=True)
    marks = _marks(columns)
    axes.set_xticks([at for at, _ in marks], [text for _, text in marks], rotation=30, ha="right")
    axes.set_ylabel("GiB")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, metadata={"Description": description})


def _marks(columns: Sequence[Column]) -> list[tuple[int, str]]:
    """A label in the middle of each run of columns that share it: at their beginnings two would overlap where one
    of them is short."""
    labels = [label for label, _ in columns]
    begins = [at for at, label in enumerate(labels) if at == 0 or labels[at - 1] != label]
    ends = [*begins[1:], len(labels)]
    return [((begin + end - 1) // 2, labels[begin]) for begin, end in zip(begins, ends, strict=True)]


def _line(text: str, x: int, y: float, colour: str) -> list[str]:
    """Over the whole width, with its text."""
    line = f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
    place = f'x="{x}" y="{y + 4 if x < LEFT else y - 3:.1f}"' + (' text-anchor="end"' if x > WIDTH / 2 else "")
    return [line, f'<text {place} font-size="11">{escape(text)}</text>']


def _html(picture: Picture) -> str:
    columns, ground = picture.columns, HEIGHT - BOTTOM
    step, scale = (WIDTH - LEFT) / len(columns), (ground - TOP) / picture.top
    shapes: list[str] = []
    for value in ticks(0, picture.top / GIB, TICKS):
        shapes += _line(f"{value:g} GiB", 4, ground - value * GIB * scale, "#ccc")
    if picture.band is not None:
        lower, upper = (ground - size * scale for size in picture.band)
        shapes.append(
            f'<rect x="{LEFT}" y="{upper:.1f}" width="{WIDTH - LEFT}" height="{lower - upper:.1f}" fill="#bbb"'
            ' fill-opacity="0.4"><title>on the device, from the lower to the upper end</title></rect>'
        )
    for at, (label, parts) in enumerate(columns):
        y = float(ground)
        for (name, colour), size in zip(picture.parts.items(), parts, strict=True):
            if size:
                y -= size * scale
                shapes.append(
                    f'<rect x="{LEFT + at * step:.1f}" y="{y:.1f}" width="{step:.2f}" height="{size * scale:.2f}"'
                    f' fill="{colour}"><title>{escape(label)}: {name} {size / GIB:.3f} GiB</title></rect>'
                )
    for at, label in _marks(columns):
        shapes.append(
            f'<text x="{LEFT + at * step:.1f}" y="{ground + 14}" font-size="10"'
            f' transform="rotate(20 {LEFT + at * step:.1f} {ground + 14})">{escape(label)}</text>'
        )
    # On alternate sides, and every text over every line: two of these lines are close to one another.
    lines = [
        _line(text, (LEFT + 4, WIDTH - 4)[number % 2], ground - size * scale, "currentColor")
        for number, (text, size) in enumerate(picture.lines)
    ]
    shapes += [shape for each in zip(*lines, strict=True) for shape in each]
    legend = " ".join(
        f'<span class="entry"><span style="color:{colour}">&#9632;</span> {escape(name)}</span>'
        for name, colour in picture.parts.items()
    )
    label = f'role="img" aria-label="{escape(picture.title)}"'
    drawn = f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 60}" width="{WIDTH}" {label}>{"".join(shapes)}</svg>'
    scrolled = f'<div class="wide" tabindex="0" role="region" aria-label="drawing">{drawn}</div>'
    body = f"<h1>{escape(picture.title)}</h1>{scrolled}<p>{legend}</p>"
    return page(picture.title, body, style=STYLE)
