"""Renders docs/models.md from the results of `python -m tests.zoo`."""

from __future__ import annotations

import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from time import strftime
from typing import Any

from tests.zoo.judge import LAYOUTS, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
# Models: every type under every layout

This page is a reference. Every model type that transformers registers for causal language models is built in a tiny
version of its published config (its kinds of layers, switches and ratios; small widths, few layers and experts) and
trained for three steps under every layout, with two processes on a CPU. Each layout is compared with one process. A
number is the largest relative difference of the loss or of the gradient norm, at any step and in the final validation.
One process (*single*) is compared with the model that transformers builds itself. The limit is 1e-4 in float64 (some
types compute parts in float32 whatever the precision). ZeRO, which has no float64, and types that transformers cannot
run in it are compared in float32, with a limit of 1e-3.

*memory* and *fsdp's memory* compare the estimated peak, in one process and under FSDP, with the counted bytes of the
fullest rank over two steps. The number is the difference of the peaks relative to the estimate; the limit is 5 %. The
bytes that remain between steps must agree to 4 KiB.

*refused* stands for a line that the run prints before it begins; the lines are below the table, and begin with the
layout. A cell *differs* (from one process) or *crash* is an open problem. An empty cell has not been tried. A star
marks the language model alone (`model.text_only=true`), because no layout splits some parts of the whole model.

With the oldest versions that pyproject.toml allows (transformers 5.17, torch 2.11) 178 types exist: under *single*
164 are equal, 8 refused, and 6 are not tried, as below.

`python -m tests.zoo TYPE` does the same for one type in some seconds; `--layouts` names some of the layouts.
"""


def versions() -> str:
    names = ("torch", "transformers", "deepspeed")
    return ", ".join(f"{name} {version(name)}" for name in names) + f", Python {platform.python_version()}"


def render(seen: Mapping[str, Mapping[str, Verdict]]) -> str:
    there = {name: known for name, known in seen.items() if known["single"]["verdict"] != "no model"}
    counts = {name: Counter(_short(known.get(name)) for known in there.values()) for name in LAYOUTS}
    lines = [
        HEAD,
        f"Written {strftime('%Y-%m-%d')} by `python -m tests.zoo --write` with {versions()}.",
        "",
        f"| of {len(there)} types | equal | refused | open | not tried |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(f"| {one} | {_equal(row)} | {row['refused']} | {_other(row)} | {row['']} |" for one, row in counts.items()),
        "",
        "| type | " + " | ".join(LAYOUTS) + " |",
        "| --- |" + " --- |" * len(LAYOUTS),
        *(
            f"| {name} | " + " | ".join(_short(there[name].get(one)) for one in LAYOUTS) + " |"
            for name in sorted(there)
        ),
        "",
        "## Refused, and why",
        "",
        *_reasons(there, "refused"),
        "## Open",
        "",
        *_reasons(there, "differs", "crash", "hang"),
        "## Not tried",
        "",
        "Registered for causal language models, but transformers' own class does not run forward and backward on token",
        "ids alone:",
        "",
        *(
            f"- {name}: {_plain(str(known['single']['note']))}"
            for name, known in sorted(seen.items())
            if name not in there
        ),
    ]
    return "\n".join(lines) + "\n"


def read(page: str) -> dict[str, dict[str, str]]:
    """The cells of a page, by type and layout."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(LAYOUTS, row[1:], strict=True)) for row in rows if len(row) == len(LAYOUTS) + 1}


def _short(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict["verdict"] != "ok":
        return str(verdict["verdict"])
    mark = "*" if verdict.get("text_only") else ""
    return (f"{verdict['distance']:.0e}" if verdict["distance"] else "0") + mark


def is_equal(cell: str) -> bool:
    return cell[:1].isdigit()


def _equal(row: Counter[str]) -> int:
    return sum(count for cell, count in row.items() if is_equal(cell))


def _other(row: Counter[str]) -> int:
    return sum(row.values()) - _equal(row) - row["refused"] - row[""]


def _reasons(there: Mapping[str, Mapping[str, Verdict]], *kinds: str) -> Iterator[str]:
    """Yield one line for each layout and reason, with the types that have this reason."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for layout in LAYOUTS:
        for name, known in sorted(there.items()):
            verdict: Any = known.get(layout, {})
            if verdict.get("verdict") in kinds:
                reason = _plain(str(verdict["note"]))
                reason = re.sub(rf"\b(a|an|A|An) {re.escape(name)}\b", r"\1 TYPE", reason)
                found[layout, re.sub(rf"\b{re.escape(name)}\b", "TYPE", reason)].append(name)
    for (layout, reason), names in found.items():
        yield f"- **{layout}**: {', '.join(names)}: {reason}"
    yield ""


def _plain(reason: str) -> str:
    """Remove the parts of a reason that differ between types: folders, classes, numbers and names of parameters."""
    reason = re.sub(r"\b[A-Z]\w+(ForCausalLM|ForConditionalGeneration|LMHeadModel|ModelWithLMHead)\b", "CLASS", reason)
    reason = re.sub(r"model\.path=\S+?(?=[:,])", "model.path=FOLDER", reason)
    reason = re.sub(r"\d+ parameters of CLASS get no gradient \(.*?\)", "parameters of CLASS get no gradient", reason)
    return " ".join(reason.removeprefix("one process: ").replace("|", "/").split())
