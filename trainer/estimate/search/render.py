"""The result of the search, as a table for people or as JSON for programs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from configs.schema import Config
from trainer.estimate.render import gib_range
from trainer.estimate.search.cost import (
    EXPOSED,
    HIDDEN,
    HOST_MEMORY_GB_PER_SECOND,
    MEMORY_ACHIEVED,
    StepTime,
    update_bytes,
)
from trainer.estimate.search.network import ACHIEVED, ASSUMED_NETWORK_GB_PER_SECOND
from trainer.estimate.search.search import Ranked, Search

# Overrides that the search sets itself; the rest of the command comes before them.
REPLACED = ("parallel=", "parallel.", "estimate.", "train.micro_batch_size=", "train.gradient_accumulation_steps=")
REPLACED += ("train.activation_checkpointing=", "train.chunked_loss=", "train.global_batch_size=")
WIDTH = 150
SAME = 0.02


def command(found: Ranked, search: Search, overrides: Sequence[str]) -> str:
    """The command that runs the layout. overrides: those that the search was given."""
    return " ".join(["python -m launch", *kept(overrides), *found.candidate.overrides, batch_override(search.config)])


def kept(overrides: Sequence[str]) -> list[str]:
    """The overrides that stay in the command of a layout."""
    # The search does not vary how sequences are split: the user's setting stays.
    own = "parallel.context_method="
    return [word for word in overrides if word.startswith(own) or not word.startswith(REPLACED)]


def batch_override(config: Config) -> str:
    """The override that gives every layout the batch at which they are compared."""
    return f"train.global_batch_size={config.train.global_batch_size}"


def render_search(search: Search, overrides: Sequence[str]) -> str:
    """The table, the reason for the first place, a command for each layout, and the assumptions."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, highlight=False)
    batch, config = search.config.train.global_batch_size, search.config
    console.print(
        f"{config.model.preset}, {config.cluster.nodes} node(s), {batch} sequences of {config.data.seq_len} per step:"
        f" {search.timed} plans timed, {search.asked} memory estimates"
    )
    if not search.best:
        console.print(f"nothing fits. {_too_large(search)}", soft_wrap=True)
        return text.getvalue()
    console.print(_table(search.best))
    if not all(found.estimate.fits for found in search.best):
        console.print("tight, all of these: their lower end fits, their upper end does not")
    console.print(_why(search))
    for number, found in enumerate(search.best, start=1):
        console.print(f"{number}  {command(found, search, overrides)}", soft_wrap=True)
    console.print(_assumptions(search), soft_wrap=True)
    return text.getvalue()


def search_to_dict(search: Search, overrides: Sequence[str]) -> dict[str, object]:
    """Bytes of the busiest rank; seconds of one step, by term."""
    return {
        "global_batch_size": search.config.train.global_batch_size,
        "plans_timed": search.timed,
        "estimates": search.asked,
        "best": [
            {
                "overrides": list(found.candidate.overrides),
                "command": command(found, search, overrides),
                "step_seconds": found.time.total,
                "seconds": dict(found.time.seconds),
                "tokens_per_second_per_gpu": found.time.tokens_per_second_per_gpu,
                "mfu": found.time.mfu,
                "verdict": str(found.estimate.verdict),
                "device_bytes": found.estimate.busiest.device_bytes,
                "device_most_bytes": found.estimate.busiest.device_most_bytes,
                "peak_reserved_bytes": found.estimate.busiest.peak_reserved_bytes,
                "host_bytes": found.estimate.busiest.host_bytes,
            }
            for found in search.best
        ],
    }


def render_search_json(search: Search, overrides: Sequence[str]) -> str:
    return json.dumps(search_to_dict(search, overrides), indent=2)


def _table(best: Sequence[Ranked]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "layout", "recompute"):
        table.add_column(name)
    for name in ("micro-batch", "GiB", "s/step", "tokens/s/GPU", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("where the time goes")
    for number, found in enumerate(best, start=1):
        plan = found.plan
        table.add_row(
            str(number),
            _layout(found),
            str(found.candidate.keys["train.activation_checkpointing"].value),
            f"{plan.batch.micro_batch_size} x {plan.batch.gradient_accumulation_steps}",
            gib_range(found.estimate.busiest, digits=1),
            f"{found.time.total:.2f}",
            f"{found.time.tokens_per_second_per_gpu:,.0f}",
            f"{found.time.mfu:.0%}",
            _shares(found.time),
        )
    return table


def _layout(found: Ranked) -> str:
    degrees = " ".join(f"{axis} {size}" for axis, size in found.plan.mesh.items() if size > 1)
    kept = ", kept gathered" if found.candidate.keys.get("parallel.reshard_after_forward") is False else ""
    schedule = found.candidate.keys.get("parallel.pipeline.schedule")
    return f"{found.candidate.preset}: {degrees}{kept}" + (f", {schedule}" if schedule else "")


def _shares(time: StepTime) -> str:
    ordered = sorted(time.seconds.items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in ordered if seconds >= 0.01 * time.total)


def _why(search: Search) -> str:
    """Compare the first with the second: the terms in which it saves most, and those in which it loses."""
    sentence = ""
    if len(search.best) > 1:
        first, second = search.best[0].time, search.best[1].time
        names = {**second.seconds, **first.seconds}
        saved = {name: second.seconds.get(name, 0.0) - first.seconds.get(name, 0.0) for name in names}
        most, least = max(saved, key=lambda name: saved[name]), min(saved, key=lambda name: saved[name])
        gained = second.total - first.total
        if gained < SAME * first.total:
            sentence = f"1 and 2 differ by {gained / first.total:.1%}, less than such a prediction can tell. "
        else:
            sentence = f"1 is {gained / first.total:.0%} faster than 2: {most} {saved[most]:.2f} s less a step"
            sentence += f", {least} {-saved[least]:.2f} s more. " if saved[least] < 0 else ". "
    return f"{sentence}{_too_large(search)}".strip() + "\n"


def _too_large(search: Search) -> str:
    if search.too_large is None:
        return ""
    found = search.too_large.estimate
    size = gib_range(found.busiest, digits=1)
    what = "Too large" if found.too_large else "Tight"
    return f"{what}, even with full recompute: {_layout(search.too_large)}, with {size} GiB."


def _assumptions(search: Search) -> str:
    config, gpu = search.config, search.best[0].estimate.device.name
    between = config.cluster.network_gb_per_second or ASSUMED_NETWORK_GB_PER_SECOND
    return (
        f"\nassumed: {gpu}; matmuls at {config.estimate.efficiency:.0%} of its peak (estimate.efficiency);"
        f" memory at {MEMORY_ACHIEVED:.0%}, links and network at {ACHIEVED:.0%} of their bandwidth; {between:g} GB/s"
        f" per GPU between nodes (cluster.network_gb_per_second); collectives hide behind {HIDDEN:.0%} of the"
        f" simultaneous computation and show at least {EXPOSED:.0%}; {update_bytes(search.size):.0f} bytes moved"
        f" per updated parameter; {config.cluster.host_gb_per_second:g} GB/s to host memory"
        " (cluster.host_gb_per_second), updates there at"
        f" {HOST_MEMORY_GB_PER_SECOND:g} GB/s. Predictions rank layouts; measure the first two."
    )
