"""Formats results.json as Markdown: one table for each part."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GIB = 2**30
Found = dict[str, Any]
Result = dict[str, Any]


def markdown(found: Found) -> str:
    """The whole report, with a heading for each part."""
    done = [result["status"] for result in found["results"]]
    counts = ", ".join(f"{done.count(status)} {status}" for status in dict.fromkeys(done))
    lines = [f"# {found['machine'].get('gpu') or 'CPU'}", "", conditions(found), "", f"{counts}."]
    for part, table in TABLES.items():
        text = table(found)
        if text:
            lines += ["", f"## {part.capitalize()}", "", text.rstrip()]
    return "\n".join(lines) + "\n"


def conditions(found: Found) -> str:
    """One line with card, driver, versions and date."""
    machine = found["machine"]
    card = machine.get("gpu") or f"CPU with {machine.get('cores')} cores"
    driver = f", driver {machine['driver']}, CUDA {machine['cuda']}" if machine.get("driver") else ""
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "deepspeed") if name in machine
    )
    return f"Measured {machine.get('date')} on one {card}{driver}; {versions}, Python {machine.get('python')}."


def parity(found: Found) -> str:
    lines = ["| case | held | distance | limit | |", "| --- | --- | ---: | ---: | --- |"]
    what = {
        "all": "loss, gradient norm, parameters",
        "loss": "loss, gradient norm",
        "near": "loss",
        "first": "first loss",
    }
    for result in _of(found, "parity"):
        numbers = result["numbers"]
        apart = f"{numbers['distance']:.0e} | {numbers['limit']:.0e}" if "distance" in numbers else " | "
        lines.append(f"| {result['name']} | {what.get(numbers.get('by'), '')} | {apart} | {_status(result)} |")
    return _table(lines)


def memory(found: Found) -> str:
    """The distribution of the prediction errors, the wrong predictions of whether a case fits, and every case."""
    rows = _of(found, "memory")
    lines: list[str] = []
    for name in ("allocated", "reserved", "device"):
        errors = sorted(abs(error) for row in rows if (error := _error(row, name)) is not None)
        if errors:
            most = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
            middle = statistics.median(errors)
            lines.append(f"- {name}: median {middle:.1%}, 90th percentile {most:.1%}, largest {errors[-1]:.1%}")
    beyond = [row for row in rows if row["status"] == "out of memory"]
    missed = [row["name"] for row in beyond if _verdict(row) not in ("does not fit", "tight")]
    fitted = [row["name"] for row in rows if row["status"] == "passed" and _verdict(row) == "does not fit"]
    if rows:
        lines.append(f"- out of memory though predicted to fit: {', '.join(missed) or 'none'} (of {len(beyond)})")
        lines.append(f"- fits though predicted not to: {', '.join(fitted) or 'none'}")
    for name in ("reserved", "device"):
        inside = [lies for row in rows if (lies := _inside(row, name)) is not None]
        if inside:
            lines.append(f"- {name}: {sum(inside)} of {len(inside)} between the lower and the upper end")
    lines += ["", "Error: predicted / measured - 1. GiB; *device* is what nvidia-smi shows for the whole card.", ""]
    head = (
        "| case | allocated: predicted | measured | error | reserved | measured | error | device | measured | error |"
    )
    lines += [head, "| --- |" + " ---: |" * 9]
    for row in rows:
        cells = [cell for name in ("allocated", "reserved", "device") for cell in _cells(row, name)]
        note = (
            ""
            if row["status"] == "passed"
            else f" ({_status(row)}{', predicted: ' + _verdict(row) if _verdict(row) else ''})"
        )
        lines.append(f"| {row['name']}{note} | {' | '.join(cells)} |")
    return _table(lines) if rows else ""


def speed(found: Found) -> str:
    rows = _of(found, "speed")
    lines = [
        "| case | | ms per step | tokens/s | MFU | this trainer / it | peak GiB |",
        "| --- | --- |" + " ---: |" * 5,
    ]
    for row in rows:
        numbers = row["numbers"]
        if "host_to_device_gb" in numbers:
            continue
        contenders: dict[str, Found] = numbers.get("contenders") or {"this trainer": numbers}
        ours = contenders.get("this trainer", {}).get("tokens_per_second")
        for name, found_ in contenders.items():
            if "step_seconds" not in found_:
                lines.append(f"| {row['name']} | {_status(row)} | | | | | |")
                continue
            share = f"{found_['mfu']:.1%}" if found_.get("mfu") else ""
            ratio = f"{ours / found_['tokens_per_second']:.3f}" if ours and name != "this trainer" else ""
            peak = f"{found_['allocated'] / GIB:.1f}" if found_.get("allocated") else ""
            cells = (
                f"{found_['step_seconds'] * 1e3:.1f} | {found_['tokens_per_second']:,.0f} | {share} | {ratio} | {peak}"
            )
            lines.append(f"| {row['name']} | {name} | {cells} |")
    for row in rows:
        if "host_to_device_gb" in row["numbers"]:
            copies, flops = _bandwidths(row["numbers"])
            lines += [
                "",
                f"Copies in GB/s: {copies}. A product of two bf16 matrices of 8,192 rows: {flops:.0f} TFLOP/s.",
            ]
    return _table(lines) if rows else ""


def pages(found: Found) -> str:
    lines: list[str] = []
    for row in _of(found, "pages"):
        numbers = row["numbers"]
        text = [f"{_status(row)}"]
        if numbers.get("measured_allocated") and numbers.get("predicted_allocated"):
            pair = numbers["predicted_allocated"] / GIB, numbers["measured_allocated"] / GIB
            text.append(f"peak {pair[0]:.2f} GiB predicted, {pair[1]:.2f} measured")
        if numbers.get("gpu_busy"):
            top = ", ".join(f"`{name}` {share:.0%}" for name, share in list(numbers["kernels"].items())[:3])
            text.append(f"the GPU is busy {numbers['gpu_busy']:.0%} of a traced step; most of it in {top}")
        lines.append(f"- {row['name']}: {'; '.join(text)}.")
    return _table(lines)


TABLES: dict[str, Callable[[Found], str]] = {"parity": parity, "memory": memory, "speed": speed, "pages": pages}


def _bandwidths(numbers: Found) -> tuple[str, float]:
    names = {
        "host_to_device_gb": "pinned host memory to the GPU",
        "device_to_host_gb": "back",
        "device_copy_gb": "on it",
    }
    return ", ".join(f"{text} {numbers[name]:,.0f}" for name, text in names.items()), numbers["bf16_tflops"]


def _of(found: Found, part: str) -> list[Result]:
    """The results of the cases that were reached."""
    return [row for row in found["results"] if row["part"] == part and row["status"] != "not reached"]


def _status(result: Result) -> str:
    note = " ".join(str(result.get("note") or "").replace("|", "/").split())[:160]
    return result["status"] + (f": {note}" if note and result["status"] != "out of memory" else "")


def _verdict(row: Result) -> str:
    return row.get("predicted", {}).get("verdict", "")


def _error(row: Result, name: str) -> float | None:
    predicted, measured = row.get("predicted", {}).get(name), row["numbers"].get(name)
    return predicted / measured - 1 if predicted and measured else None


def _inside(row: Result, name: str) -> bool | None:
    """Whether the measurement lies within the predicted range. None if either is missing."""
    predicted, measured = row.get("predicted", {}), row["numbers"].get(name)
    if not measured or not predicted.get(f"{name}_most"):
        return None
    return predicted[name] <= measured <= predicted[f"{name}_most"]


def _cells(row: Result, name: str) -> Iterator[str]:
    for side in (row.get("predicted", {}), row["numbers"]):
        yield f"{side[name] / GIB:.3f}" if side.get(name) else ""
    error = _error(row, name)
    yield "" if error is None else f"{error:+.1%}"


def _table(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
