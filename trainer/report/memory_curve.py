"""Memory over the first two steps, predicted by the estimator and measured on a rank, in one picture.

    recorder = Recorder()                    on the CPU: fed with the tracker's events
    recorder.mark(1, "forward_backward")     what happens from here on belongs to that part of step 1
    recorder.curve()                         {(1, "forward_backward"): [bytes, ...], (1, "optimizer"): ...}
    from_snapshot(snapshot, marks)           the same from the CUDA allocator's own history

Positions within a part are by order, not by time: the prediction has one moment for each layer and direction; the
measurement has the maximum of each of as many equal shares of the part's allocations and frees. Compare heights, not
positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.estimate.estimate import RankEstimate
from trainer.estimate.timeline import COMPONENTS
from trainer.estimate.tracker import Alive, Event
from trainer.html import COLOURS
from trainer.process.files import replace_text

PARTS = ("forward_backward", "optimizer")
WIDTHS = {"forward_backward": 0.8, "optimizer": 0.2}
"""Of each part in the picture of a step."""
UPDATE = "optimizer step"  # the phase of the estimator's timeline that is the second part
SHARES = 200
MIB = 2**20

Curve = dict[tuple[int, str], list[int]]
"""Bytes alive over a part of a step, by step (from 1) and part."""


class Recorder:
    """Bytes alive after each event of a StorageTracker, sorted by what the run was doing."""

    def __init__(self) -> None:
        self._alive = Alive()
        self._found: Curve = {}
        self._now: list[int] | None = None

    def __call__(self, event: Event) -> None:
        if self._alive.count(event) and self._now is not None:
            self._now.append(self._alive.total)

    def mark(self, step: int, part: str) -> None:
        """From here on it is this part of this step; one that is not in PARTS is not kept."""
        self._now = self._found.setdefault((step, part), [self._alive.total]) if part in PARTS else None

    def curve(self) -> Curve:
        return {key: _shares(sizes) for key, sizes in self._found.items()}


def from_snapshot(snapshot: Mapping[str, Any], device: int, marks: Sequence[tuple[int, int, str]]) -> Curve:
    """The curve of a CUDA device whose history was recorded from before its first allocation.

    snapshot: of torch.cuda.memory._snapshot. marks: microseconds since the epoch, step and part of each beginning.
    """
    found: Curve = {}
    alive, waiting, now = 0, list(marks), None
    for entry in snapshot["device_traces"][device]:
        while waiting and waiting[0][0] <= entry["time_us"]:
            _, step, part = waiting.pop(0)
            now = found.setdefault((step, part), [alive]) if part in PARTS else None
        if entry["action"] == "alloc":
            alive += entry["size"]
        elif entry["action"] == "free_requested":
            alive -= entry["size"]
        else:
            continue
        if now is not None:
            now.append(alive)
    return {key: _shares(sizes) for key, sizes in found.items()}


def save_curves(folder: Path, ranks: Mapping[int, tuple[RankEstimate | None, Curve]]) -> list[Path]:
    """Write memory.json, and memory.png where matplotlib is installed: of each rank what was predicted and measured."""
    content = [
        {
            "rank": rank,
            "components": COMPONENTS,
            "predicted": [
                {"step": moment.step, "phase": moment.phase, "bytes": moment.total, "parts": moment.parts}
                for moment in (estimate.curve if estimate else ())
            ],
            "measured": [{"step": step, "part": part, "bytes": sizes} for (step, part), sizes in curve.items()],
        }
        for rank, (estimate, curve) in ranks.items()
    ]
    replace_text(folder / "memory.json", json.dumps(content) + "\n")
    if find_spec("matplotlib") is None:
        return [folder / "memory.json"]
    draw_curves(ranks, folder / "memory.png")
    return [folder / "memory.json", folder / "memory.png"]


def draw_curves(ranks: Mapping[int, tuple[RankEstimate | None, Curve]], path: Path) -> None:
    """One panel for each rank: predicted components stacked, the measured total as a line over them."""
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(10, 4 * len(ranks)), layout="constrained")
    panels = figure.subplots(len(ranks), 1, squeeze=False)[:, 0]
    for axes, (rank, (estimate, curve)) in zip(panels, ranks.items(), strict=True):
        steps = max(step for step, _ in curve)
        peak = max(max(sizes) for sizes in curve.values())
        title = f"rank {rank}: measured peak {peak / MIB:,.2f} MiB"
        if estimate is not None:
            _draw_predicted(axes, estimate)
            title += f", predicted {estimate.peak_allocated_bytes / MIB:,.2f} MiB"
        _draw_measured(axes, curve)
        axes.set(title=title, ylabel="MiB allocated", xlim=(0, steps))
        places = [(step - 1 + _begin(part) + WIDTHS[part] / 2, step, part) for step, part in sorted(curve)]
        names = {"forward_backward": "step {}: forward and backward", "optimizer": "update"}
        axes.set_xticks([place for place, _, _ in places], [names[part].format(step) for _, step, part in places])
        for step, part in curve:
            axes.axvline(step - 1 + _begin(part), color="#999999", linewidth=0.6)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def _draw_predicted(axes: Any, estimate: RankEstimate) -> None:
    places: list[float] = []
    widths: list[float] = []
    parts: list[tuple[int, ...]] = []
    for step in sorted({moment.step for moment in estimate.curve if moment.step > 0}):
        for part in PARTS:
            inside = [m for m in estimate.curve if m.step == step and (m.phase == UPDATE) == (part == "optimizer")]
            width = WIDTHS[part] / max(1, len(inside))
            places += [step - 1 + _begin(part) + width * number for number in range(len(inside))]
            widths += [width] * len(inside)
            parts += [moment.parts for moment in inside]
    base = [0.0] * len(places)
    for index, (name, colour) in enumerate(zip(COMPONENTS, COLOURS, strict=True)):
        sizes = [moment[index] / MIB for moment in parts]
        if any(sizes):
            axes.bar(places, sizes, widths, bottom=base, align="edge", color=colour, label=f"predicted: {name}")
        base = [below + size for below, size in zip(base, sizes, strict=True)]


def _draw_measured(axes: Any, curve: Curve) -> None:
    places: list[float] = []
    heights: list[float] = []
    for (step, part), sizes in sorted(curve.items()):
        places += [step - 1 + _begin(part) + WIDTHS[part] * (number + 0.5) / len(sizes) for number in range(len(sizes))]
        heights += [size / MIB for size in sizes]
    axes.plot(places, heights, color="black", linewidth=1.2, label="measured")


def _begin(part: str) -> float:
    return 0.0 if part == "forward_backward" else WIDTHS["forward_backward"]


def _shares(sizes: Sequence[int]) -> list[int]:
    """The largest of each of SHARES equal parts; of fewer numbers, themselves."""
    count = min(SHARES, len(sizes))
    bounds = [len(sizes) * number // count for number in range(count + 1)]
    return [max(sizes[begin:end]) for begin, end in pairwise(bounds)]
