"""The loss curve of a run as a small picture for a terminal, drawn by plotille in Braille dots."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

WIDTH, HEIGHT = 60, 10
POINTS = 2 * WIDTH  # of a line: a character is two dots wide


def loss_picture(losses: Mapping[int, float], validations: Mapping[int, float]) -> str | None:
    """losses: of training, by step, drawn as a line of the means of neighbouring steps. validations: by step, drawn as
    o. None: fewer than two steps make no curve."""
    points = sorted((step, loss) for step, loss in losses.items() if isfinite(loss))
    dots = sorted((step, loss) for step, loss in validations.items() if isfinite(loss))
    if len(points) < 2:
        return None
    import plotille

    size = -(-len(points) // POINTS)
    parts = [points[begin : begin + size] for begin in range(0, len(points), size)]
    figure = plotille.Figure()
    figure.width, figure.height, figure.with_colors = WIDTH, HEIGHT, False
    figure.x_label, figure.y_label = "step", "loss"
    figure.x_ticks_fkt = lambda low, _: f"{low:<8.0f}"
    figure.y_ticks_fkt = lambda low, _: f"{low:10.4g}"
    steps = [step for step, _ in [*points, *dots]]
    figure.set_x_limits(min(steps), max(steps))
    means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]
    figure.plot([step for step, _ in means], [loss for _, loss in means])
    if dots:
        figure.scatter([step for step, _ in dots], [loss for _, loss in dots], marker="o")
    return f"{figure.show()}{'   o validation' if dots else ''}"


def readable_by(encoding: str | None) -> bool:
    """Whether an output of this encoding can show the picture."""
    return (encoding or "").lower().startswith("utf")
