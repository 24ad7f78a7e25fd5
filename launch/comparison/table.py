"""The numbers of a comparison as rows of text. Next: `figures`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from launch.comparison.runs import differences, distance, incomparable
from trainer.report.reading import Run
from trainer.report.terminal import size

MIB = 2**20
NONE = "-"
TITLES = (
    "run",
    "differs in",
    "last loss",
    "validation loss",
    "loss difference",
    "gradient norm difference",
    "tokens/s",
    "MFU",
    "predicted MiB",
    "measured MiB",
)
LEGEND = """\
Losses are of the last step and of the last validation. Loss and gradient norm difference: the largest relative one
from the reference over all logged steps, |a - b| / |b|. Tokens/s: of all ranks together, in the median step, the
first left out; MFU where the device's peak is known. MiB: peak of tensors on the fullest rank in the first two steps,
as the estimator predicts it and as the run measured it: by torch's allocator on GPUs, on the CPU where
estimate.measure=true counts."""


def table(runs: Sequence[Run], reference: Run | None) -> list[tuple[str, ...]]:
    """One row for each finished run, in the order of TITLES."""
    return [_row(run, reference) for run in runs if run.problem is None]


def _row(run: Run, reference: Run | None) -> tuple[str, ...]:
    summary = run.summary
    apart = distance(run, reference) if reference is not None and run is not reference else None
    if run is reference:
        changed, distances = "the reference", (NONE, NONE)
    else:
        changed = _changed(run, reference)
        distances = (_scientific(apart.loss), _scientific(apart.grad_norm)) if apart else ("not comparable", NONE)
    return (
        run.name,
        changed,
        _fixed(summary.get("loss_last")),
        _fixed(summary.get("validation_loss_last")),
        *distances,
        f"{speed:,.0f}" if (speed := summary.get("tokens_per_second")) is not None else NONE,
        f"{mfu:.1%}" if (mfu := summary.get("mfu")) is not None else NONE,
        _mebibytes(run.predicted_bytes),
        _mebibytes(run.measured_bytes),
    )


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def outcome(run: Run) -> tuple[str, ...]:
    """A run of a sweep as a row: name, state, losses, speed, peak memory of the fullest GPU (on a CPU: of the largest
    process) and folder. An unfinished run shows the values of its last step."""
    last = run.steps[-1] if run.steps else {}
    speed = run.summary.get("tokens_per_second") or last.get("tokens_per_second")
    memory = last.get("peak_allocated_bytes") or last.get("peak_host_bytes")
    return (
        run.name,
        "finished" if run.problem is None else "not through" if run.config is not None else "not begun",
        _fixed(last.get("loss")),
        _fixed([*run.validations.values()][-1] if run.validations else None),
        f"{speed:,.0f}" if speed is not None else NONE,
        size(memory) if memory is not None else NONE,
        str(run.folder) if run.folder is not None else NONE,
    )


def _changed(run: Run, reference: Run | None) -> str:
    if reference is None or reference.config is None or run.config is None:
        return NONE
    return ", ".join(differences(run.config, reference.config)) or "nothing"


def memory_by_rank(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """Run, ranks, predicted and measured MiB, for runs whose ranks differ. Neighbouring equal ranks share a row."""
    rows: list[tuple[str, str, str, str]] = []
    for run in runs:
        predicted, measured = run.predicted_bytes, run.measured_bytes
        cells = [(_at(predicted, rank), _at(measured, rank)) for rank in range(max(len(predicted), len(measured)))]
        groups = [(key, len(list(group))) for key, group in itertools.groupby(cells)]
        begin = 0
        for key, count in groups if len(groups) > 1 else []:
            last = begin + count - 1
            rows.append((run.name, str(begin) if count == 1 else f"{begin}-{last}", *key))
            begin = last + 1
    return rows


def problems(runs: Sequence[Run], reference: Run | None) -> Iterator[str]:
    """One line for each unfinished run, and for each run whose losses cannot be compared with the reference's."""
    for run in runs:
        if run.problem is not None:
            yield f"{run.name}: {run.problem}"
        elif reference is not None and (other := incomparable(run, reference)):
            yield f"{run.name}: not held against {reference.name}, for it has {', '.join(other)}"


def setting(runs: Sequence[Run], reference: Run | None) -> Iterator[str]:
    """The common settings of the runs, line by line, as the reference has them."""
    if reference is None or reference.config is None:
        return
    config, packages = reference.config, reference.versions.get("packages", {})
    name = config.model.path or config.model.preset
    yield f"model {name}, {config.model.weights} weights"
    yield f"data {config.data.source}, {config.data.seq_len} tokens per sequence"
    yield f"{reference.tokens_per_step:,} tokens per step, {reference.summary['steps']} steps"
    device = reference.versions.get("device", {}).get("name")
    versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "deepspeed") if packages.get(name)]
    yield ", ".join([f"Python {reference.versions.get('python')}", *versions, f"on {device}"])
    yield "ranks: " + ", ".join(f"{run.name} {world}" for run in runs if (world := _world(run)))


def _world(run: Run) -> int | None:
    return len(run.predicted_bytes) or len(run.measured_bytes) or None


def _at(sizes: Sequence[int], rank: int) -> str:
    return _mebibytes(sizes[rank : rank + 1])


def _mebibytes(sizes: Sequence[int]) -> str:
    return f"{max(sizes) / MIB:,.2f}" if sizes else NONE


def _fixed(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else NONE


def _scientific(value: float | None) -> str:
    return NONE if value is None else "0" if value == 0 else f"{value:.1e}"
