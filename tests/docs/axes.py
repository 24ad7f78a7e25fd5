"""Five axes in one drawing: the part of the model and of the batch that each of 16 ranks holds.

    python -m tests.docs.axes      docs/figures/five-dimensions.svg

Who holds what comes from the plan: the ranks' places on the mesh, and the split of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.load import load_config
from trainer.axes.pipeline.table import split_layers, stages_of_rank
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

FILE = Path(__file__).parents[2] / "docs" / "figures" / "five-dimensions.svg"
OVERRIDES = "parallel=context parallel.pp=2 parallel.dp_replicate=2 parallel.dp_shard=1 parallel.cp=2 parallel.tp=2"
OVERRIDES += " cluster.gpus_per_node=16"
LAYERS, CELL, CARD = 4, 22, (190, 128)
COLOURS = {"model": "#2f6fbf", "batch": "#c2600c"}


def svg() -> str:
    shapes = "".join(shape for rank in range(16) for shape in _card(rank))
    style = (
        "text{font:11px sans-serif;fill:#59616d}.cell{fill:none;stroke:#8a94a3}"
        "@media(prefers-color-scheme:dark){text{fill:#a3acb9}}"
    )
    width, height = 4 * CARD[0], 4 * CARD[1]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img"'
        f' aria-label="16 ranks under pp 2, dp 2, cp 2, tp 2"><style>{style}</style>{shapes}</svg>\n'
    )


def _card(rank: int) -> Iterator[str]:
    config = load_config(OVERRIDES.split())
    plan = make_plan(config, Machine())
    place = plan.coordinates(rank)
    schedule, pp = config.parallel.pipeline.schedule, plan.degree("pp")
    stages = split_layers(LAYERS, pp, split=config.parallel.pipeline.split)
    mine = stages_of_rank(schedule, pp=pp, rank=place["pp"], stages_per_rank=1)
    own = {layer for stage in mine for layer in stages[stage]}
    left, top = rank % 4 * CARD[0] + 6, rank // 4 * CARD[1] + 14
    names = {"pp": "pp", "dp_replicate": "dp", "cp": "cp", "tp": "tp"}
    where = ", ".join(f"{said} {place[axis]}" for axis, said in names.items())
    yield f'<text x="{left}" y="{top}">rank {rank}: {where}</text>'
    yield from _grid(left, top + 8, rows=LAYERS, held={(layer, place["tp"]) for layer in own}, colour=COLOURS["model"])
    read = {(2 * place["dp_replicate"] + line, place["cp"]) for line in (0, 1)}
    yield from _grid(left + 3 * CELL, top + 8, rows=4, held=read, colour=COLOURS["batch"])


def _grid(left: int, top: int, *, rows: int, held: set[tuple[int, int]], colour: str) -> Iterator[str]:
    for row in range(rows):
        for column in (0, 1):
            fill = f' style="fill:{colour}"' if (row, column) in held else ""
            x, y = left + column * CELL, top + row * CELL
            yield f'<rect class="cell" x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}"{fill}/>'


if __name__ == "__main__":
    FILE.write_text(svg())
    print(FILE)
