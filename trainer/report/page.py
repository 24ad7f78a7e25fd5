"""RUN_DIR/report.html: a run on one page, from its folder. The page needs no other file and no network.

Rank 0 writes it when the run ends, however it ends; `python -m launch` writes it for ranks that were killed, and
`cookbook report RUN_DIR` at any time. Torch-free.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from configs.errors import CookbookError
from configs.load import from_yaml
from trainer.html import COLOURS, page, table
from trainer.process.disks import writing
from trainer.process.files import read_json
from trainer.process.private import write_private
from trainer.process.status import FINISHED, STATUS, STOPPED, read_status
from trainer.report.curves import STYLE, Series, draw
from trainer.report.folder import RESUMED, run_label
from trainer.report.metrics import Comparison, Summary
from trainer.report.reading import Run, read_run
from trainer.report.terminal import render_summary, size

log = logging.getLogger(__name__)

REPORT, PREDICTION = "report.html", "prediction.json"
OWN_STYLE = (
    STYLE
    + """
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); padding: .6em; }
td { text-align: left; overflow-wrap: anywhere; } .good { color: var(--good); } .fair { color: var(--fair); }
.bars { max-width: 44em; } .bar { display: flex; height: 1.2em; margin: .4em 0; }"""
)
ENTRY_POINTS = ("trainer/__main__.py", "launch/cookbook.py", "cookbook")


@contextmanager
def reported(folder: Path, *, main: bool) -> Iterator[None]:
    """Write the page when the context is left, whatever ends it. main: this is rank 0; others write nothing."""
    failing = True
    try:
        yield
        failing = False
    finally:
        if main:
            report_end(folder, failing=failing)


def report_end(folder: Path, *, failing: bool) -> None:
    """Write the page of a run that has begun, unless it exists. An error costs a line, never the run.

    failing: the run has its own problem, which may be the page's problem too, so only one line is written.
    """
    status, there = folder / STATUS, folder / REPORT
    try:
        newer = there.exists() and there.stat().st_mtime_ns >= status.stat().st_mtime_ns
        if (folder / "metrics.jsonl").exists() and not newer:
            write_report(folder)
    except Exception as error:  # a page that cannot be made must not fail the run
        if failing:
            return
        log.warning("%s: is not written (%s: %s)", there, type(error).__name__, error)


def write_report(folder: Path) -> Path:
    """Write the page over an earlier one. Raises CookbookError where the folder holds no run, or cannot be written."""
    text = report(folder)
    target = folder / REPORT
    partial = folder / f".{REPORT}.partial"
    with writing(folder):
        partial.unlink(missing_ok=True)
        write_private(partial, text)  # the command line is on it
        partial.replace(target)
    return target


def report(folder: Path) -> str:
    """The page's text."""
    run = read_run(folder.name, folder)
    record = _last_record(folder)
    title = run_label(run.config) if run.config is not None else folder.name
    parts = [f"<h1>{escape(title)}</h1>", _state(run, read_status(folder), record), f"<p>{escape(str(folder))}</p>"]
    parts.append(f"<pre>{escape(_command(record / 'argv.json'))}</pre>")
    if (text := _summary(run)) is not None:
        parts.append(f"<pre>{escape(text)}</pre>")
    parts.append(f'<div class="curves">{"".join(_curves(run))}</div>')
    parts += _memory(run, read_json(folder / PREDICTION))
    parts.append(f"<h2>Plan</h2><pre>{escape(_text(record / 'plan.txt'))}</pre>")
    parts.append("<h2>Versions</h2>" + table(("what", "version"), [*_versions(record)]))
    return page(f"{title}: report", "\n".join(parts), style=OWN_STYLE)


def _last_record(folder: Path) -> Path:
    """The folder with the record of the newest start."""
    return max(folder.glob(f"{RESUMED}/*/"), default=folder)


def _state(run: Run, status: Mapping[str, object], record: Path) -> str:
    done = f"step {status.get('step')}"
    with suppress(OSError, UnicodeDecodeError, CookbookError):
        length = from_yaml((record / "config.yaml").read_text()).train
        done += f" of {length.steps}" if not length.epochs else ""
    if run.problem is None:
        return f'<p class="good">finished: {escape(done)}</p>'
    kind = "fair" if status.get("state") in (STOPPED, FINISHED) else "problem"
    return f'<p class="{kind}">{escape(run.problem)} ({escape(done)})</p>'


def _command(file: Path) -> str:
    """The typed command; ranks of any launcher get the overrides, which every entry point accepts."""
    try:
        program, *arguments = json.loads(file.read_text())
    except (OSError, ValueError):
        return "the command line is not on record"
    ours = program == "-m" or program.endswith(ENTRY_POINTS)
    return shlex.join(["python", "-m", "launch", *arguments] if ours else [program, *arguments])


def _summary(run: Run) -> str | None:
    """As shown on the terminal; None if the run has not finished, or is another version's."""
    values = {key: value for key, value in run.summary.items() if key != "kind"}
    try:
        return render_summary(Summary(**{**values, "memory": Comparison(**values["memory"])}))
    except (TypeError, KeyError):
        return None


def _curves(run: Run) -> Iterator[str]:
    def column(key: str) -> dict[int, float]:
        return {line["step"]: line[key] for line in run.steps if line.get(key) is not None}

    groups = dict.fromkeys(name for line in run.steps for name in line.get("lr_of") or ())
    rates = [
        Series(name, {line["step"]: line["lr_of"][name] for line in run.steps if name in (line.get("lr_of") or ())})
        for name in groups
    ]
    yield draw("Loss", [Series("training", run.losses), Series("validation", run.validations, dots=True)])
    yield draw("Gradient norm", [Series("before clipping", run.grad_norms)])
    yield draw("Learning rate", rates or [Series("all parameters", column("lr"))])
    yield draw("Tokens per second", [Series("all ranks", column("tokens_per_second"))])


def _memory(run: Run, prediction: Mapping[str, Any]) -> Iterator[str]:
    """The predicted bytes by component, and the measured sums."""
    yield "<h2>Memory</h2>"
    measured = run.summary.get("memory") or {}
    components: Mapping[str, int] = prediction.get("components") or {}
    total = prediction.get("peak_allocated_bytes")
    of_busiest = _of_busiest(measured, total)
    if not total:
        yield f"<p>{escape(str(prediction.get('note') or 'Nothing was predicted.'))}</p>"
    else:
        yield from _bars(components, total, of_busiest)
    last = run.steps[-1] if run.steps else {}
    rows = [
        ("tensors, predicted", total),
        ("tensors, measured in the first two updates", of_busiest),
        *_furthest(measured, of_busiest),
        ("allocator, predicted to reserve at least", prediction.get("peak_reserved_bytes")),
        ("allocator, reserved in the whole run", last.get("peak_reserved_bytes")),
        ("largest process, resident", last.get("peak_host_bytes")),
        ("of that Python and libraries, before the model", measured.get("libraries_bytes")),
    ]
    yield table(("peak", "bytes"), [(name, size(value)) for name, value in rows if value])
    if note := measured.get("memory_note"):
        yield f"<p>{escape(note)}</p>"


def _of_busiest(measured: Mapping[str, Any], total: int | None) -> int | None:
    """Measured memory of a rank of the kind that was predicted to be the busiest; None if not measured."""
    predicted, found = measured.get("predicted_bytes_by_rank"), measured.get("measured_bytes_by_rank")
    if predicted and found:
        return max((peak for expected, peak in zip(predicted, found, strict=True) if expected == total), default=None)
    same = measured.get("predicted_allocated_bytes") in (total, None)
    return measured.get("measured_allocated_bytes") if same else None


def _furthest(measured: Mapping[str, Any], shown: int | None) -> Iterator[tuple[str, int]]:
    """The rank with the worst prediction, unless it is shown already."""
    found, expected = measured.get("measured_allocated_bytes"), measured.get("predicted_allocated_bytes")
    if found and expected and found != shown:
        rank = measured.get("memory_rank")
        yield f"tensors of rank {rank}, the furthest from its prediction: predicted", expected
        yield f"tensors of rank {rank}: measured", found


def _bars(components: Mapping[str, int], total: int, measured: int | None) -> Iterator[str]:
    """The predicted components, and on the same scale the one sum that is measured."""

    def bar(parts: Sequence[tuple[str, int, str]]) -> str:
        spans = "".join(
            f'<span style="flex:{value};background:{colour}" title="{escape(name)}: {size(value)}"></span>'
            for name, value, colour in parts
            if value
        )
        width = 100 * sum(value for _, value, _ in parts) / max(total, measured or 0)
        return f'<div class="bar" style="width:{width:.1f}%">{spans}</div>'

    shown = [(name, value, COLOURS[at % len(COLOURS)]) for at, (name, value) in enumerate(components.items())]
    legend = " ".join(
        f'<span style="color:{colour}">&#9632;</span> {escape(name)} {size(value)}' for name, value, colour in shown
    )
    yield f'<p>Predicted peak of the busiest rank, {size(total)}:</p><div class="bars">{bar(shown)}'
    if measured:
        yield f"<p>Measured in the first two updates, {size(measured)}, which is {measured / total:.1%} of it:</p>"
        yield bar([("measured", measured, "var(--quiet)")])
    yield f"</div><p>{legend}</p>"
    yield "<p>Only the sum can be measured, so a difference does not say which component it belongs to.</p>"


def _versions(record: Path) -> Iterator[tuple[str, str]]:
    found, git = read_json(record / "versions.json"), read_json(record / "git.json")
    device = found.get("device") or {}
    yield "device", str(device.get("name"))
    yield "Python", f"{found.get('python')}, {found.get('platform')}"
    yield from ((name, version) for name, version in (found.get("packages") or {}).items() if version)
    for name, state in git.items():
        yield f"commit of {name}", f"{state.get('commit')}{' and changes' if state.get('dirty') else ''}"


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return "not on record"
