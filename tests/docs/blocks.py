"""Parts of the pages that are made from the code: drawings, plans, differences of configurations, refusals.

Each function returns Markdown. All are torch-free and quick, so that the tests make them again and compare.
`tests/docs/write.py` puts them into the pages.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.choices import DType, EngineName, LauncherName, OffloadDevice, TuningMethod
from configs.errors import CookbookError
from configs.foreign import ABSENT, Fate
from configs.foreign import table as foreign_table
from configs.keys import value_at
from configs.load import group_options, load_config, usual
from configs.schema import Config
from launch.command import Rendezvous, build_command
from trainer.axes.pipeline.table import SCHEDULES, default_stages_per_rank, split_layers, stages_of_rank
from trainer.axes.pipeline.timeline import bubble_fraction, draw_schedule, in_flight
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.plan.plan import Plan
from trainer.rules import config_fields

ROOT = Path(__file__).parents[2]
GPUS = Machine(gpus=8)
"""The machine that pages without `cluster` speak of where a GPU is meant."""


def drawing(file: str, number: str = "0") -> str:
    """An indented block of a module's docstring. number: which one, from 0."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    assert text is not None, f"{file} has no docstring"
    blocks = re.findall(r"(?:^(?: {4,}.*)?\n)+", f"{text}\n", re.MULTILINE)
    drawn = [block for block in blocks if block.strip()][int(number)]
    return _fenced(textwrap.dedent(drawn.strip("\n")))


def difference(choice: str, other: str = "") -> str:
    """What one configuration has that the other has not. Each: a layout or overrides. other: else `single`, or none."""
    before, after = (
        name if "=" in name or not name else f"parallel={name}"
        for name in (other or ("" if "=" in choice else "single"), choice)
    )
    values, others = (_flat(load_config(shlex.split(overrides))) for overrides in (after, before))
    lines = []
    for key, value in values.items():
        if value != others[key] and not key.endswith(".preset"):
            lines += [f"- {key}={_word(others[key])}", f"+ {key}={_word(value)}"]
    return _fenced("\n".join([f"  {before or 'the defaults'}  ->  {after}", *lines]), "diff")


def ranks(overrides: str) -> str:
    """Who holds and reads what under a plan: one line for each rank, at most 16 of them."""
    config = load_config(shlex.split(overrides))
    plan = make_plan(config, Machine())
    rows = [_rank_row(config, plan, rank) for rank in range(min(plan.world_size, 16))]
    titles = ["rank", *rows[0]]
    cells = [titles, *([str(rank), *row.values()] for rank, row in enumerate(rows))]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return _fenced("\n".join([f"python -m launch {overrides}", "", *lines]))


def refusal(overrides: str) -> str:
    """What a mistake is answered with, before anything starts."""
    try:
        make_plan(load_config(shlex.split(overrides)), Machine())
    except CookbookError as error:
        return _fenced("\n".join([f"$ python -m launch {overrides}", *error.problems]))
    raise AssertionError(f"{overrides} is not refused")


def commands(overrides: str) -> str:
    """What `python -m launch` starts with each launcher, for node 0."""
    lines = []
    for launcher in LauncherName:
        if launcher is LauncherName.python:
            continue
        config = load_config([*shlex.split(overrides), f"launcher={launcher}"])
        plan = make_plan(config, GPUS)
        meeting = Rendezvous(address="NODE_0", port=29500)
        command = build_command(
            config, plan, shlex.split(overrides), run_dir=Path("runs/RUN"), rendezvous=meeting, environment={}, cores=64
        )
        program, *rest = command.argv
        text = replace(command, argv=(Path(program).name, *rest)).text()
        lines.append(textwrap.fill(text, 110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    return _fenced("\n\n".join(lines))


def foreign(section: str) -> str:
    """The table of another trainer's names: how each is spelt here, their default where ours differs, what to know."""
    before, _ = usual()
    rows: list[str] = []
    for name, entry in foreign_table()[section].items():
        if entry.fate is Fate.harmless:
            continue
        here = ", ".join(f"`{each}`" for each in entry.keys) or "none"
        differs = entry.default is not ABSENT and entry.default is not None
        if differs and entry.key is not None and entry.times is None and value_at(before, entry.key) == entry.default:
            differs = False
        default = f"`{str(entry.default).lower()}`" if differs else ""
        rows.append(f"| `{name}` | {here} | {default} | {entry.note.replace('|', '')} |")
    return "\n".join(["| there | here | their default | |", "| --- | --- | --- | --- |", *rows])


def schedule(name: str, pp: str, micro_batches: str) -> str:
    """A pipeline's step in time."""
    share = bubble_fraction(name, pp=int(pp), micro_batches=int(micro_batches))
    picture = draw_schedule(name, pp=int(pp), micro_batches=int(micro_batches))
    return _fenced(f"{name}: the ranks wait {share:.0%} of the step\n\n{picture}")


def bubbles(pp: str) -> str:
    """Waiting and holding of every schedule, by the number of micro-batches."""
    ranks, counts = int(pp), (int(pp), 2 * int(pp), 4 * int(pp), 8 * int(pp))
    lines = [
        f"| schedule ({ranks} ranks) | " + " | ".join(f"{count} micro-batches" for count in counts) + " | held |",
        "| --- " * (len(counts) + 2) + "|",
    ]
    for name in SCHEDULES:
        shares = []
        for count in counts:
            possible = name != "dualpipev" or count >= 2 * ranks
            shares.append(f"{bubble_fraction(name, pp=ranks, micro_batches=count):.0%}" if possible else "too few")
        held = _most_held(name, ranks, counts[1])
        lines.append(f"| `{name}` | {' | '.join(shares)} | {held} |")
    return "\n".join(lines)


def parity(*overrides: str) -> str:
    """The measured rows of these layouts or with these keys, out of docs/parity.md."""
    adapters = overrides[0].startswith("tuning=")
    head, rows = _table("parity.md", "adapters under" if adapters else "layout")
    found = [line for line in rows if {*" ".join(line.split("|")[1:3]).split()} & {*overrides}]
    missing = [word for word in overrides if not any(word in line.split() for line in found)]
    assert not missing, f"docs/parity.md has no rows of {missing}"
    return "\n".join([*head, *found])


def measured(*patterns: str) -> str:
    """The cases with such names (`*`: anything; `-` before: not those), out of docs/what-fills-memory.md."""
    head, rows = _table("what-fills-memory.md", "case")
    cases = {line.split("|")[1].strip(): line for line in rows}
    matched = {pattern: {*fnmatch.filter(cases, pattern.removeprefix("-"))} for pattern in patterns}
    assert all(matched.values()), f"docs/what-fills-memory.md has no case for one of {patterns}"
    wanted = set().union(*(names for pattern, names in matched.items() if not pattern.startswith("-")))
    wanted = wanted.difference(*(names for pattern, names in matched.items() if pattern.startswith("-")))
    return "\n".join([*head, *(line for name, line in cases.items() if name in wanted)])


def dtypes() -> str:
    """What each precision sets."""
    titles = ("`param_dtype` (compute)", "`reduce_dtype` (gradients between ranks)", "`master_dtype` (optimizer)")
    lines = [f"| `precision=` | {' | '.join(titles)} | loss scale |", "| --- | --- | --- | --- | --- |"]
    for name in group_options()["precision"]:
        precision = load_config([f"precision={name}"]).precision
        compute = f"{precision.param_dtype}{', matmuls in TF32' if precision.tf32 else ''}"
        scale = "dynamic" if precision.param_dtype is DType.float16 and precision.loss_scale is None else ""
        lines.append(f"| `{name}` | {compute} | {precision.reduce_dtype} | {precision.master_dtype} | {scale} |")
    return "\n".join(lines)


def predictions() -> str:
    """Predicted against measured memory in a sentence, out of docs/what-fills-memory.md."""
    apart = {}
    for line in _table("what-fills-memory.md", "case")[1]:
        name, *_, share = (cell.strip() for cell in line.split("|")[1:-1])
        apart[name] = float(share.rstrip("%"))
    close = sum(share <= 0.1 for share in apart.values())
    worst = max(apart, key=lambda name: apart[name])
    return f"{len(apart)} cases: {close} within 0.1 %; the worst ({worst}) off by {apart[worst]} %."


def _table(page: str, title: str) -> tuple[list[str], list[str]]:
    """Head and rows of the table in a page of docs/ whose first column has this title."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {title} |"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :]))
    return lines[begin : begin + 2], rows


def layouts() -> str:
    """All presets, as their files describe themselves, and how far docs/parity.md has them from one process."""
    apart = _distances()
    titles = ("`parallel=`", "engine", "what", "memory per GPU", "loss difference", "parameters difference")
    lines = [f"| {' | '.join(titles)} |", "| --- " * 4 + "| ---: " * 2 + "|"]
    for name in group_options()["parallel"]:
        config = load_config([f"parallel={name}"])
        about, memory = _header(ROOT / "configs" / "parallel" / f"{name}.yaml")
        lines.append(f"| `{name}` | {config.parallel.engine} | {about} | {memory} | {apart.get(name, ' | ')} |")
    return "\n".join(lines)


def _distances() -> dict[str, str]:
    """Of each layout, in its finest precision, the largest distance of any case: of the loss | of the parameters."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _table("parity.md", "layout")[1]]
    found: dict[str, str] = {}
    for layout in {row[0] for row in rows}:
        mine = [row for row in rows if row[0] == layout]
        finest = max(row[4] for row in mine)
        loss, _, parameters = zip(*([float(cell) for cell in row[5:]] for row in mine if row[4] == finest), strict=True)
        found[layout] = f"{max(loss):.0e} | {max(parameters):.0e}"
    return found


def _header(file: Path) -> tuple[str, str]:
    """What a preset is, and its memory law, from the comment at its head."""
    comment = [line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("# ")]
    text = " ".join(comment)
    about, _, rest = text.partition("Memory per GPU")
    about = re.split(r" When: ", about)[0]
    memory = rest.removeprefix(" (bf16)").removeprefix(":").partition("  python")[0]
    assert about and memory, f"{file.name}: the comment at its head names no memory per GPU"
    return about.strip(), memory.strip()


def _rank_row(config: Config, plan: Plan, rank: int) -> dict[str, str]:
    place = plan.coordinates(rank)
    row = {"reads": f"{_part(plan.data_rank(rank), plan.data_parallel_size)} of the batch"}
    if plan.degree("cp") > 1:
        row["of each sequence"] = _part(place["cp"], plan.degree("cp"))
    if plan.degree("pp") > 1:
        row["layers"] = _layers(config, plan, place["pp"])
    if plan.degree("tp") > 1:
        row["of each matrix"] = _part(place["tp"], plan.degree("tp"))
    share = place["dp_shard"] * plan.degree("cp") + place["cp"]
    parted = _part(share, plan.fsdp_size)
    offload, nowhere = config.parallel.offload, OffloadDevice.none
    adapters = config.tuning.method is not TuningMethod.full
    partitioned = plan.zero_stage if plan.engine is EngineName.deepspeed else 3 if plan.fsdp_size > 1 else 0
    for least, what, where in (
        (3, "parameters", offload.parameters),
        (2, "gradients", nowhere),
        (1, "optimizer states", offload.optimizer),
    ):
        held = parted if partitioned >= least else "all"
        of = " of the adapters" if adapters and what != "parameters" else ""
        row[what] = held + of + (f" ({where})" if where is not nowhere else "")
    return row


def _layers(config: Config, plan: Plan, rank: int) -> str:
    pipeline, pp = config.parallel.pipeline, plan.degree("pp")
    each = pipeline.stages_per_rank or default_stages_per_rank(pipeline.schedule)
    fields = config_fields(config)
    count = int(fields.get("num_hidden_layers") or fields["n_layer"])
    ranges = split_layers(count, pp * each, split=pipeline.split)
    mine = stages_of_rank(pipeline.schedule, pp=pp, rank=rank, stages_per_rank=each)
    return " and ".join(f"{ranges[stage].start}-{ranges[stage].stop - 1}" for stage in mine)


def _most_held(name: str, pp: int, micro_batches: int) -> str:
    """Maximum number of micro-batches whose activations a rank holds, in whole ranks' worth of layers."""
    weight = 1 / default_stages_per_rank(name)
    peaks = in_flight(name, pp=pp, micro_batches=micro_batches)
    return " ".join(f"{sum(peak.values()) * weight:g}" for peak in peaks)


def _part(number: int, of: int) -> str:
    return f"{number + 1}/{of}" if of > 1 else "all"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    return dict(_leaves(value, prefix))


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(value):
        key, held = f"{prefix}{item.name}", getattr(value, item.name)
        if dataclasses.is_dataclass(held):
            yield from _leaves(held, f"{key}.")
        else:
            yield key, held


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"
