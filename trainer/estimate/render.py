"""An estimate as a table for people, or as JSON and CSV for programs.

The JSON's schema is the function `to_dict`. Every form has three totals and keeps them apart: allocated (bytes of the
tensors), reserved (bytes that torch's allocator has taken for them), device (with CUDA context and NCCL: nvidia-smi).
The last two are ranges (`verdict`).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from trainer.axes import EXPERTS
from trainer.axes.expert import worst_imbalance
from trainer.estimate.estimate import Estimate, RankEstimate
from trainer.estimate.suggest import Suggestion
from trainer.estimate.timeline import COMPONENTS
from trainer.estimate.verdict import Verdict, judge
from trainer.plan.plan import Plan

GIB = 2**30
LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "master weights and optimizer states",
    "activations": "activations held",
    "loss": "loss and logits",
    "buffers": "communication, gathered and cast parameters",
    "workspace": "workspace (temporaries, cuBLAS)",
}
WIDEST = 6  # more kinds of ranks do not fit into one line
DEVICE_TOTALS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_reserved_most_bytes",
    "device_bytes",
    "device_most_bytes",
)
TOTALS = (*DEVICE_TOTALS, "host_bytes", "nvme_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One configuration's estimate with all that is printed of it.

    suggestions, largest_micro_batch: None where they were not asked for.
    """

    overrides: tuple[str, ...]
    config: dict[str, object]
    plan: Plan
    estimate: Estimate
    suggestions: Sequence[Suggestion] | None = None
    largest_micro_batch: int | None = None


def to_dict(answer: Answer) -> dict[str, object]:
    """All bytes are of one rank; `components` are those at its peak and add up to peak_allocated_bytes, `highest` the
    most that each of them ever holds. peak_reserved_bytes and device_bytes are lower ends, with `_most_` upper ones."""
    found = answer.estimate
    return {
        "overrides": list(answer.overrides),
        "config": answer.config,
        "plan": answer.plan.record(),
        "device": {
            "name": found.device.name,
            "capacity_bytes": found.device.capacity_bytes,
            "assumed": found.device.assumed,
            "context_bytes": found.context_bytes,
            "nccl_bytes": found.nccl_bytes,
        },
        "ranks": [_rank(rank, found) for rank in found.ranks],
        "parameters": found.profile.anatomy.whole,
        "active_parameters": found.profile.anatomy.whole_active,
        "busiest": found.busiest.kind,
        **{total: getattr(found.busiest, total) for total in DEVICE_TOTALS},
        "fits": found.fits,
        "verdict": str(found.verdict),
        "margin_bytes": found.margin_bytes,
        "largest_micro_batch": answer.largest_micro_batch,
        "suggestions": [
            {
                "overrides": list(suggestion.overrides),
                "why": suggestion.why,
                "verdict": str(suggestion.estimate.verdict),
                **{total: getattr(suggestion.estimate.busiest, total) for total in DEVICE_TOTALS},
            }
            for suggestion in answer.suggestions or ()
        ],
    }


def _rank(rank: RankEstimate, found: Estimate) -> dict[str, object]:
    verdict = judge(rank.device_bytes, rank.device_most_bytes, found.device.capacity_bytes)
    return {
        "kind": rank.kind,
        "count": rank.count,
        "components": {f"{name}_bytes": size for name, size in rank.components.items()},
        "highest": {f"{name}_bytes": size for name, size in rank.highest.items()},
        **{total: getattr(rank, total) for total in TOTALS},
        "peak_phase": rank.peak_phase,
        "peak_step": rank.peak_step,
        "fits": verdict in (Verdict.fits, Verdict.unknown),
        "verdict": str(verdict),
    }


def render_json(answers: Sequence[Answer], *, sweep: bool) -> str:
    """An object for one configuration, a list of them for a sweep."""
    values = [to_dict(answer) for answer in answers]
    return json.dumps(values if sweep else values[0], indent=2, default=str)


def render_csv(answers: Sequence[Answer]) -> str:
    """One line for each configuration and kind of rank."""
    out = io.StringIO()
    names = ["overrides", "rank", "count", *(f"{name}_bytes" for name in COMPONENTS)]
    names += [*(f"highest_{name}_bytes" for name in COMPONENTS), *TOTALS]
    names += ["peak_phase", "peak_step", "device", "capacity_bytes", "fits", "verdict"]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for answer in answers:
        for rank in answer.estimate.ranks:
            values = _rank(rank, answer.estimate)
            components, highest = values.pop("components"), values.pop("highest")
            assert isinstance(components, dict) and isinstance(highest, dict)
            values |= {
                **components,
                **{f"highest_{name}": size for name, size in highest.items()},
                "rank": values.pop("kind"),
                "overrides": " ".join(answer.overrides),
                "device": answer.estimate.device.name,
                "capacity_bytes": answer.estimate.device.capacity_bytes,
            }
            writer.writerow(values)
    return out.getvalue().rstrip("\n")


def render_table(answer: Answer) -> str:
    """One configuration: components and totals of each kind of rank, the verdict, what to change."""
    ranks = answer.estimate.ranks
    table = _text(_ranks_below_each_other(answer) if len(ranks) > WIDEST else _ranks_side_by_side(answer))
    moments = any("(" in component(rank, name) for rank in ranks for name in COMPONENTS)
    note = ["in parentheses: what the component holds at its own highest moment, another one"] if moments else []
    return "\n".join([answer.plan.describe(), *_experts(answer), "", table, *note, "", *_verdict(answer)])


def _experts(answer: Answer) -> list[str]:
    """In the manner of `Plan.describe`; nothing for a model without routed experts."""
    anatomy = answer.estimate.profile.anatomy
    if (said := anatomy.routing()) is None:
        return []
    lines = [f"experts    {anatomy.whole_active:,} of {anatomy.whole:,} parameters are active for a token: {said}"]
    chosen, experts = next(parameter.whole.routed for parameter in anatomy.parameters() if parameter.whole.routed)
    if (ranks := answer.plan.degree(EXPERTS)) > 1:
        lines.append(
            f"           activations at estimate.imbalance (1: each of {ranks} ranks gets as many tokens); at worst"
            f" {worst_imbalance(ranks, experts, chosen):g}, where all go to experts of one rank"
        )
    return lines


def _ranks_side_by_side(answer: Answer) -> Table:
    found = answer.estimate
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("GiB per GPU" if found.device.capacity_bytes is not None else "GiB per process")
    for rank in found.ranks:
        table.add_column(_named(rank, found), justify="right")
    for name in COMPONENTS:
        table.add_row(LABELS[name], *(component(rank, name) for rank in found.ranks))
    table.add_section()
    table.add_row("peak allocated", *(_gib(rank.peak_allocated_bytes) for rank in found.ranks))
    if found.device.capacity_bytes is not None:
        table.add_row("peak reserved by torch", *(gib_range(rank, "peak_reserved") for rank in found.ranks))
        table.add_row(
            "CUDA context, NCCL (assumed)", *(_gib(found.context_bytes + found.nccl_bytes) for _ in found.ranks)
        )
        table.add_row("on the device (nvidia-smi)", *(gib_range(rank) for rank in found.ranks), style="bold")
    for label, total in (("host memory", "host_bytes"), ("NVMe", "nvme_bytes")):
        if any(getattr(rank, total) for rank in found.ranks):
            table.add_row(f"{label} per rank", *(_gib(getattr(rank, total)) for rank in found.ranks))
    table.add_row("peak in", *(f"{rank.peak_phase}, step {rank.peak_step}" for rank in found.ranks))
    return table


def _ranks_below_each_other(answer: Answer) -> Table:
    """For a long pipeline: a line for each kind of rank."""
    found = answer.estimate
    table = Table(box=None, pad_edge=False, header_style="bold")
    host = any(rank.host_bytes for rank in found.ranks)
    totals = ["allocated", "reserved", "device", *(["host"] if host else [])]
    for name in ("GiB per GPU", *COMPONENTS, *totals, "peak in"):
        table.add_column(name, justify="left" if name in ("GiB per GPU", "peak in") else "right")
    for rank in found.ranks:
        sizes = [*(component(rank, name) for name in COMPONENTS), _gib(rank.peak_allocated_bytes)]
        sizes += [gib_range(rank, "peak_reserved"), gib_range(rank), *([_gib(rank.host_bytes)] if host else [])]
        table.add_row(_named(rank, found), *sizes, f"{rank.peak_phase}, step {rank.peak_step}")
    return table


def _named(rank: RankEstimate, found: Estimate) -> str:
    busiest = " (busiest)" if rank is found.busiest and len(found.ranks) > 1 else ""
    return f"{rank.count} x {rank.kind}{busiest}"


def render_sweep(answers: Sequence[Answer]) -> str:
    """One line for each configuration of a sweep, by the overrides that differ."""
    common = [word for word in common_overrides(answers) if not word.startswith("estimate.")]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("overrides", "GPUs", "busiest", "allocated", "reserved", "device GiB", "peak in", "verdict"):
        numeric = name in ("GPUs", "allocated", "reserved", "device GiB")
        table.add_column(name, justify="right" if numeric else "left")
    for answer, label in zip(answers, own_overrides(answers), strict=True):
        rank = answer.estimate.busiest
        sizes = (_gib(rank.peak_allocated_bytes), gib_range(rank, "peak_reserved"), gib_range(rank))
        phase = f"{rank.peak_phase}, step {rank.peak_step}"
        shown = (label, f"{answer.plan.world_size:,}", rank.kind, *sizes, phase)
        table.add_row(*shown, str(answer.estimate.verdict))
    return "\n".join([*([f"all with {' '.join(common)}"] if common else []), _text(table)])


def common_overrides(answers: Sequence[Answer]) -> list[str]:
    """Words that all configurations of a sweep have; none if it is of one."""
    first, *others = answers
    return [word for word in first.overrides if all(word in one.overrides for one in others)] if others else []


def own_overrides(answers: Sequence[Answer]) -> list[str]:
    """Of each configuration the overrides that not all have: what distinguishes it."""
    common = common_overrides(answers)
    return [" ".join(word for word in one.overrides if word not in common) for one in answers]


def _verdict(answer: Answer) -> list[str]:
    found = answer.estimate
    margin, capacity, device = found.margin_bytes, found.device.capacity_bytes, found.device
    if margin is None or capacity is None:
        return ["no GPU in this plan: nothing to compare with (cluster=8xh100, or cluster.gpu=NAME, names one)"]
    named = f"{device.name} ({_gib(capacity)} GiB)"
    assumed = "; assumed, since cluster.gpu names none" if device.assumed else ""
    least = capacity - found.busiest.device_most_bytes  # free at the upper end
    match found.verdict:
        case Verdict.does_not_fit:
            text = f"lacks {_gib(-margin)} GiB"
        case Verdict.tight:
            text = f"leaves {_gib(margin)} GiB free at the lower end, lacks {_gib(-least)} GiB at the upper"
        case _:
            text = f"leaves {_gib(least)} to {_gib(margin)} GiB free"
    lines = [f"{found.verdict}: {named} {text}{assumed}"]
    if found.too_large:
        for suggestion in answer.suggestions or ():
            size = gib_range(suggestion.estimate.busiest)
            lines.append(f"  {size:>16} GiB with {' '.join(suggestion.overrides)}   ({suggestion.why})")
        if answer.suggestions is not None and not answer.suggestions:
            frozen = not all(parameter.trainable for parameter in found.profile.anatomy.parameters())
            others = "try parallel=pipeline_fsdp" if frozen else "estimate.search=true ranks the others that do"
            lines.append(f"  no change of this layout makes it fit: {others}")
    if answer.largest_micro_batch is not None:
        lines.append(f"largest train.micro_batch_size that fits: {answer.largest_micro_batch}")
    return lines


def component(rank: RankEstimate, name: str) -> str:
    """GiB at the peak of the rank, and in parentheses the component's own maximum where that is another."""
    size, highest = _gib(rank.components[name]), _gib(rank.highest[name])
    return size if highest == size else f"{size} ({highest})"


def gib_range(rank: RankEstimate, total: str = "device", *, digits: int = 2) -> str:
    """The lower and the upper end of a total that is a range; one number where they are the same."""
    lower, upper = getattr(rank, f"{total}_bytes") / GIB, getattr(rank, f"{total}_most_bytes") / GIB
    return f"{lower:,.{digits}f}" + ("" if lower == upper else f" to {upper:,.{digits}f}")


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=240, color_system=None)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
