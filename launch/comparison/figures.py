"""The numbers of a comparison as pictures, drawn by matplotlib (an optional dependency). Next: `page`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from configs.errors import EnvironmentProblem
from launch.comparison.runs import incomparable
from launch.comparison.table import MIB
from trainer.html import COLOURS
from trainer.report.reading import Run

STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
MEASURED, PREDICTED = COLOURS[0], "#cccccc"


def check_matplotlib() -> None:
    """Raise EnvironmentProblem if drawing is impossible: checked before a comparison that takes hours."""
    if find_spec("matplotlib") is None:
        raise EnvironmentProblem("compare: draws with matplotlib, which is not installed; pip install matplotlib")


def draw_losses(runs: Sequence[Run], reference: Run) -> bytes:
    """PNG: training losses by step (points: validation), and their relative difference from the reference."""
    figure, (left, right) = _figure(2)
    for number, run in enumerate(runs):
        # For lines that coincide: later ones are thinner and dashed, so the earlier ones stay visible.
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": STYLES[number % len(STYLES)],
            "linewidth": max(1.0, 4.0 - number * 3 / max(1, len(runs) - 1)),
        }
        steps = sorted(run.losses)
        left.plot(steps, [run.losses[step] for step in steps], label=run.name, **look)
        left.plot(
            list(run.validations), list(run.validations.values()), "o", markersize=7 - number % 5, color=look["color"]
        )
        if run is not reference and not incomparable(run, reference):
            common = sorted(run.losses.keys() & reference.losses.keys())
            apart = [abs(run.losses[step] - reference.losses[step]) / abs(reference.losses[step]) for step in common]
            right.plot(common, apart, MARKERS[number % len(MARKERS)], label=run.name, color=look["color"], alpha=0.7)
    left.set(title="training loss (points: validation)", xlabel="step", ylabel="cross-entropy per token")
    right.set(title=f"loss against {reference.name}", xlabel="step", ylabel="relative difference")
    # A log scale has no zero, which means equal to the last bit.
    right.set_yscale("symlog", linthresh=1e-16)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
        axes.grid(alpha=0.3)
    return _png(figure)


def draw_speed_and_memory(runs: Sequence[Run]) -> bytes:
    """PNG: tokens per second, and the peak memory of the fullest rank, predicted and measured."""
    figure, (left, right) = _figure(2)
    names = [run.name for run in runs]
    places = range(len(runs))
    left.barh(places, [run.summary.get("tokens_per_second") or 0 for run in runs], color=MEASURED)
    left.set(title="tokens per second, all ranks", yticks=places, yticklabels=names)
    for shift, label, colour, sizes in (
        (-0.2, "predicted", PREDICTED, [run.predicted_bytes for run in runs]),
        (0.2, "measured", MEASURED, [run.measured_bytes for run in runs]),
    ):
        if any(sizes):
            where = [place + shift for place in places]
            right.barh(where, [max(size, default=0) / MIB for size in sizes], 0.4, label=label, color=colour)
    right.set(title="peak memory of the fullest rank, MiB", yticks=places, yticklabels=names)
    if right.patches:
        right.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def _figure(columns: int) -> tuple[Any, Any]:
    """A figure without a window and without shared state."""
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(11, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
