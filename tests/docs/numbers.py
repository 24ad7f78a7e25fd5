"""Tables of the pages that take runs or traces: what `memory-estimate` predicts, what real runs hold.

Each function returns a Markdown table, and `check_*` says what a table must be like without making it again.
`tests/docs/write.py` puts them into the pages.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

from PIL import Image

from configs.load import load_config
from launch.answers import answer
from tests.benchmarks import published as published_runs
from tests.docs.comparison import check_comparison, check_profiled, comparison, profiled  # noqa: F401
from tests.docs.tuning import check_methods, methods  # noqa: F401
from tests.support.held import held
from tests.support.rounding import STEPS, rounded
from trainer.estimate.estimate import estimate
from trainer.estimate.plot import save_plot
from trainer.estimate.render import LABELS, Answer, component, gib_range, render_table
from trainer.estimate.timeline import COMPONENTS
from trainer.estimate.tracing import NotEstimated
from trainer.estimate.verdict import Verdict
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine

DOCS = Path(__file__).parents[2] / "docs"
GIB, MIB = 2**30, 2**20
LAYOUTS = (
    "parallel=ddp",
    "parallel=zero1",
    "parallel=zero2",
    "parallel=zero3",
    "parallel=fsdp",
)
RANKS = (2, 4)
PRECISIONS = (
    "precision=fp32",
    "precision=bf16",
    "precision=fp16",
    "precision=fp16 precision.loss_scale=1",
    "precision=bf16 precision.master_dtype=bfloat16 precision.reduce_dtype=bfloat16",
    "precision=fp8",
    "precision=fp8 precision.float8.head=true",
    "precision=fp8 precision.float8.recipe=rowwise_with_gw_hp",
)


def memory(overrides: str) -> str:
    """Predicted memory per GPU. overrides: those of all rows | those of the first row | ..."""
    common, rows = _split(overrides)
    cells = [_memory_row(common, row) for row in rows]
    return "\n".join([*_memory_head(common), *cells])


def check_memory(overrides: str, table: str) -> None:
    """Rows and columns as asked for; every component adds up to the peak."""
    common, rows = _split(overrides)
    lines = table.splitlines()
    assert lines[:4] == _memory_head(common), "another head"
    assert [line.split("|")[1].strip() for line in lines[4:]] == [f"`{row}`" for row in rows], "other rows"
    for line in lines[4:]:
        numbers = [cell.strip() for cell in line.split("|")[2:]]
        if numbers[0].startswith("not estimated"):
            continue
        sizes = [float(cell.split(" (")[0].replace(",", "")) for cell in numbers[:-4]]
        *parts, peak = sizes
        assert abs(sum(parts) - peak) < 0.05, f"{line}: the parts do not add up"
        make_plan(load_config(shlex.split(f"{common} {line.split('`')[1]}")), Machine(gpus=8))


def _split(overrides: str) -> tuple[str, list[str]]:
    common, *rows = (part.strip() for part in overrides.split("|"))
    return common, rows


def _memory_head(common: str) -> list[str]:
    titles = [*COMPONENTS, "peak allocated", "on the device", "host per rank", "peak in"]
    return [
        f"GiB per GPU of `memory-estimate {common}` with",
        "",
        f"| | {' | '.join(titles)} |",
        "| --- |" + " ---: |" * (len(titles) - 1) + " --- |",
    ]


def _memory_row(common: str, row: str) -> str:
    try:
        found = answer(shlex.split(f"{common} {row}"), compare=True)
    except NotEstimated as error:
        return f"| `{row}` | not estimated: {error.problems[0]} |"
    return f"| `{row}` | {' | '.join(_memory_cells(found))} |"


def _memory_cells(found: Answer) -> list[str]:
    rank = found.estimate.busiest
    kind = "" if len(found.estimate.ranks) == 1 else f"{rank.kind}: "
    sizes = [f"{rank.peak_allocated_bytes / GIB:,.2f}", gib_range(rank), f"{rank.host_bytes / GIB:,.2f}"]
    return [*(component(rank, name) for name in COMPONENTS), *sizes, f"{kind}{rank.peak_phase}, step {rank.peak_step}"]


def fits(overrides: str) -> str:
    """Device memory of models under layouts. overrides: those of all cells | model | ... || layout | ..."""
    common, models, layouts = _split_fits(overrides)
    rows = [f"| `{model}` | {' | '.join(_fit(common, model, row) for row in layouts)} |" for model in models]
    return "\n".join([*_fits_head(common, layouts), *rows])


def check_fits(overrides: str, table: str) -> None:
    common, models, layouts = _split_fits(overrides)
    lines = table.splitlines()
    assert lines[:4] == _fits_head(common, layouts), "another head"
    assert [line.split("`")[1] for line in lines[4:]] == models, "other rows"
    assert all(line.count("|") == len(layouts) + 2 for line in lines[2:]), "other columns"


def _split_fits(overrides: str) -> tuple[str, list[str], list[str]]:
    first, second = overrides.split("||")
    common, models = _split(first)
    return common, models, [part.strip() for part in second.split("|")]


def _fits_head(common: str, layouts: list[str]) -> list[str]:
    titles = " | ".join(f"`{layout}`" for layout in layouts)
    return [
        f"GiB on the device of `memory-estimate {common}` with",
        "",
        f"| | {titles} |",
        "| --- |" + " ---: |" * len(layouts),
    ]


def _fit(common: str, model: str, layout: str) -> str:
    try:
        found = answer(shlex.split(f"{common} {model} {layout}"), compare=True).estimate
    except NotEstimated:
        return "not estimated"
    size = f"{found.busiest.device_bytes / GIB:,.0f}"
    marks = {Verdict.fits: "**", Verdict.tight: "*"}.get(found.verdict, "")
    return f"{marks}{size}{marks}"


def estimated(overrides: str) -> str:
    """All that `memory-estimate` prints."""
    return f"```text\n$ memory-estimate {overrides}\n{render_table(answer(shlex.split(overrides)))}\n```"


def check_estimated(overrides: str, text: str) -> None:
    assert text.startswith(f"```text\n$ memory-estimate {overrides}\n"), "another command"
    assert "peak allocated" in text


def picture(name: str, overrides: str) -> str:
    """The memory of a step, drawn into docs/NAME."""
    file = DOCS / name
    save_plot([answer(shlex.split(overrides))], str(file))
    return f"![`memory-estimate {overrides} estimate.plot=docs/{name}`]({name})"


def check_picture(name: str, overrides: str, text: str) -> None:
    """The picture is of these overrides, and of the peak that is predicted for them today."""
    assert text.endswith(f"]({name})")
    with Image.open(DOCS / name) as image:
        drawn = image.info["Description"]
    peak = answer(shlex.split(overrides), compare=True).estimate.busiest.peak_allocated_bytes
    assert drawn == f"{overrides}: {peak} bytes", "an old picture"


def components() -> str:
    """What each column of the tables above holds."""
    lines = ["| column | what it is |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {LABELS[name]} |" for name in COMPONENTS)])


def holding() -> str:
    """Bytes per parameter that ranks of a real run hold, by layout and number of ranks."""
    lines = _holding_head()
    for overrides in LAYOUTS:
        found = [held([overrides], ranks) for ranks in RANKS]
        moments = ("at_rest", "between_steps", "accumulating")
        numbers = " | ".join(f"{getattr(one, moment):.1f}" for moment in moments for one in found)
        lines.append(f"| `{overrides}` | {numbers} |")
    return "\n".join(lines)


def check_holding(table: str) -> None:
    lines = table.splitlines()
    assert lines[:2] == _holding_head(), "another head"
    assert [line.split("`")[1] for line in lines[2:]] == list(LAYOUTS), "other rows"


def _holding_head() -> list[str]:
    moments = ("before step 1", "between steps", "between micro-batches")
    titles = [f"{moment}, {ranks} ranks" for moment in moments for ranks in RANKS]
    return [f"| bytes per parameter | {' | '.join(titles)} |", "| --- |" + " ---: |" * len(titles)]


def precisions() -> str:
    """What a short run in each precision loses."""
    lines = _precisions_head()
    exact = rounded([PRECISIONS[0]]).gradient
    for overrides in PRECISIONS:
        found = rounded(shlex.split(overrides))
        apart = (found.gradient - exact).norm().item() / exact.norm().item()
        numbers = f"{apart:.4%} | {found.zero_gradients:.3%} | {found.unmoved:.1%} | {found.loss:.4f}"
        lines.append(f"| `{overrides}` | {numbers} |")
    return "\n".join(lines)


def check_precisions(table: str) -> None:
    lines = table.splitlines()
    assert lines[:2] == _precisions_head(), "another head"
    rows = {line.split("`")[1]: [cell.strip(" %") for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(rows) == list(PRECISIONS), "other rows"
    columns = ({overrides: float(cells[column]) for overrides, cells in rows.items()} for column in range(3))
    apart, zeros, unmoved = columns
    fine, coarse, with_head, by_row = (apart[overrides] for overrides in ("precision=bf16", *PRECISIONS[-3:]))
    assert fine < 1 < by_row < min(coarse, with_head), "scales of rows lose less"
    assert zeros["precision=fp16 precision.loss_scale=1"] > zeros["precision=fp16"], "scaling keeps small gradients"
    assert unmoved[PRECISIONS[-4]] > 1 > unmoved["precision=bf16"], "updates are lost without a float32 master"


def _precisions_head() -> list[str]:
    first = "gradient difference | gradients of the head that are zero"
    titles = f"{first} | parameters unmoved after {STEPS} steps | loss of the last step"
    return [f"| | {titles} |", "| --- | ---: | ---: | ---: | ---: |"]


def predicted() -> str:
    """Predicted against measured, from the very cases of tests/test_memory_measured.py."""
    from tests.test_memory_measured import CASES, measure_at_rest

    lines = _predicted_head()
    with tempfile.TemporaryDirectory() as folder:
        for name, (ranks, _, own) in CASES.items():
            overrides = ["data=synthetic", *own, f"data.cache_dir={folder}"]
            config = load_config(overrides)
            plan = make_plan(config, Machine(world_size=ranks, local_world_size=ranks))
            expected = max(kind.peak_allocated_bytes for kind in estimate(config, plan).ranks)
            found = max(rank.peak for rank in measure_at_rest(overrides, [1.002 * expected] * ranks))
            sizes = f"{expected / MIB:.2f} | {found / MIB:.2f} | {abs(expected / found - 1):.1%}"
            lines.append(f"| {name} | {ranks} | {sizes} |")
    return "\n".join(lines)


def check_predicted(table: str) -> None:
    from tests.test_memory_measured import CASES

    lines = table.splitlines()
    assert lines[:2] == _predicted_head(), "another head"
    shown = {line.split("|")[1].strip() for line in lines[2:]}
    assert shown <= CASES.keys(), "a case that is no more"
    layouts = {name: overrides[0] for name, (_, _, overrides) in CASES.items()}
    missing = set(layouts.values()) - {layouts[name] for name in shown}
    assert not missing, f"no case of {', '.join(sorted(missing))}"


def _predicted_head() -> list[str]:
    titles = "| case | processes | predicted peak, MiB | measured peak, MiB | difference |"
    return [titles, "| --- | ---: | ---: | ---: | ---: |"]


def published() -> str:
    """The planner's predicted speed against published ones."""
    return published_runs.table()


def check_published(table: str) -> None:
    lines = table.splitlines()
    assert tuple(lines[:2]) == published_runs.HEAD, "another head"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:] if line.startswith("|")]
    assert [row[0] for row in rows] == [run.name for run in published_runs.RUNS], "other rows"
    for name, predicted, found, ratio, _ in rows:
        quotient = float(predicted.replace(",", "")) / float(found.replace(",", ""))
        assert abs(quotient - float(ratio)) < 0.03, f"{name}: another ratio"
    ratios = [row[3] for row in rows]
    assert lines[-1].endswith(f"from {min(ratios)} to {max(ratios)}."), "another spread"
