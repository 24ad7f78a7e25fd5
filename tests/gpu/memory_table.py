"""The error table of docs/memory.md: every case is a real run of the trainer on one GPU, against its own prediction.

    python -m tests.gpu.memory_table --page docs/memory.md      on a machine with a GPU; an hour or so
    python -m tests.gpu.memory_table --device cpu               the same with a tiny model and counted tensors: minutes

Ranks of larger worlds, whose neighbours do not exist (`fake_rank`), follow the runs of one process.
A run that ends without a summary counts as out of memory; the table then says whether that was predicted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from configs.load import load_config
from trainer.machine import Machine
from trainer.memory.estimate import Verdict, estimate
from trainer.plan import make_plan

GIB = 2**30
BEGIN, END = "<!-- measured on a GPU -->\n", "<!-- end of measured -->\n"
RUN = ["data=synthetic", "train.steps=3", "train.eval_samples=0", "train.export=false", "checkpoint.final=false"]
RUN += ["checkpoint.every=0", "logging.progress=off"]

GPU_GRID = {
    "model": ["model=gpt2", "model=llama3_2_1b"],
    "layout": [f"parallel={name}" for name in ("single", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")],
    "precision": ["precision=bf16", "precision=fp32"],
    "recompute": ["train.activation_checkpointing=none", "train.activation_checkpointing=full"],
    "batch": ["train.micro_batch_size=1", "train.micro_batch_size=8"],
    "optimizer": ["optimizer=adamw", "optimizer=sgd", "optimizer=adafactor", "optimizer=adamw_8bit"],
}
UNDIVIDED = {"optimizer=adafactor", "optimizer=adamw_8bit"}  # run where tensors are whole
GPU_WORDS = ["cluster.device=cuda", "cluster.gpus_per_node=1", "data.seq_len=1024"]
CPU_GRID = {
    "model": ["model=tiny"],
    "layout": ["parallel=single", "parallel=zero3"],
    "precision": ["precision=bf16", "precision=fp32"],
    "recompute": ["train.activation_checkpointing=full"],
    "batch": ["train.micro_batch_size=2"],
    "optimizer": ["optimizer=adamw", "optimizer=sgd"],
}
CPU_WORDS = ["cluster.device=cpu", "cluster.gpus_per_node=1", "data.seq_len=64", "estimate.measure=true"]

LARGE = ["precision=bf16", "cluster.device=cuda", "data.seq_len=4096", "train.micro_batch_size=1"]
LARGE += ["train.activation_checkpointing=full", "data=synthetic"]
SMALL = ["model=tiny", "precision=bf16", "cluster.device=cpu", "data.seq_len=64", "train.micro_batch_size=1"]
SMALL += ["data=synthetic", "model.config.num_attention_heads=8", "model.config.num_key_value_heads=8"]
EIGHT = ["train.gradient_accumulation_steps=8"]
DIVIDED = [
    "parallel=3d",
    "parallel.pp=8",
    "parallel.tp=8",
    "parallel.dp_replicate=1",
    "parallel.sequence_parallel=true",
]
FAKE_RANKS: dict[str, list[tuple[int, int, list[str]]]] = {
    "cuda": [
        (0, 8, ["model=llama3_1_8b", "parallel=fsdp", *LARGE]),
        (0, 8, ["model=llama3_1_8b", "parallel=tensor", "parallel.tp=8", "parallel.sequence_parallel=true", *LARGE]),
        (0, 64, ["model=llama3_1_70b", "parallel=fsdp", *LARGE]),
        *((rank, 64, ["model=llama3_1_70b", *DIVIDED, *EIGHT, *LARGE]) for rank in (0, 24, 63)),
    ],
    "cpu": [
        (0, 8, [*SMALL, "parallel=fsdp"]),
        (7, 8, [*SMALL, "parallel=tensor", "parallel.tp=8"]),
        (3, 4, [*SMALL, "parallel=pipeline", "parallel.pp=4", *EIGHT]),
        (5, 8, [*SMALL, "parallel=3d", "parallel.pp=4", "parallel.tp=2", "parallel.dp_replicate=1", *EIGHT]),
    ],
}
"""Rank, world size and configuration of ranks whose neighbours do not exist (`fake_rank`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Bytes. measured: None where the run did not get that far; reserved: None on the CPU."""

    case: str
    verdict: Verdict
    predicted: int
    predicted_reserved: int
    measured: int | None
    measured_reserved: int | None

    @property
    def error(self) -> float | None:
        """Relative to what was measured; above 0 the prediction was too high."""
        return None if self.measured is None else self.predicted / self.measured - 1

    @property
    def reserved_error(self) -> float | None:
        return None if self.measured_reserved is None else self.predicted_reserved / self.measured_reserved - 1


def cases(device: str) -> Iterator[list[str]]:
    grid, common = (GPU_GRID, GPU_WORDS) if device == "cuda" else (CPU_GRID, CPU_WORDS)
    for choice in itertools.product(*grid.values()):
        if UNDIVIDED.isdisjoint(choice) or "parallel=single" in choice:
            yield [*choice, *common]


def measure(words: Sequence[str], folder: Path) -> Row:
    """One run in a process of its own: the next one begins with an empty allocator."""
    run_dir = folder / "run"
    overrides = [*words, *RUN, f"data.cache_dir={folder}/cache"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *overrides, f"train.run_dir={run_dir}"], capture_output=True, text=True
    )
    config = load_config(overrides)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    found = estimate(config, make_plan(config, Machine(gpus=torch.cuda.device_count())), found_gpu=gpu)
    summary = run_dir / "summary.json"
    if not summary.exists() and "out of memory" not in done.stderr:
        raise RuntimeError(f"{' '.join(overrides)} failed:\n{done.stderr}")
    memory = json.loads(summary.read_text())["memory"] if summary.exists() else {}
    return Row(
        case=" ".join(word.split("=")[-1] for word in words[: len(GPU_GRID)]),
        verdict=found.verdict,
        predicted=found.busiest.peak_allocated_bytes,
        predicted_reserved=found.busiest.peak_reserved_bytes,
        measured=memory.get("measured_allocated_bytes"),
        measured_reserved=memory.get("measured_reserved_bytes"),
    )


def measure_fake(rank: int, world_size: int, words: Sequence[str], folder: Path) -> Row:
    """One rank of a world that is not there, in a process of its own."""
    overrides = [*words, f"data.cache_dir={folder}/cache"]
    command = [sys.executable, "-m", "tests.gpu.fake_rank", str(rank), str(world_size), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    config = load_config(overrides)
    plan = make_plan(config, Machine(gpus=world_size, world_size=world_size, local_world_size=world_size))
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    found = estimate(config, plan, found_gpu=gpu)
    if done.returncode and "out of memory" not in done.stderr:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    memory = {} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    predicted = found.of_rank(plan, rank)
    degrees = " ".join(f"{axis}={size}" for axis, size in plan.mesh if size > 1)
    return Row(
        case=f"{config.model.preset} {degrees}, rank {rank} of {world_size}",
        verdict=found.verdict,
        predicted=predicted.peak_allocated_bytes,
        predicted_reserved=predicted.peak_reserved_bytes,
        measured=memory.get("measured_allocated_bytes"),
        measured_reserved=memory.get("measured_reserved_bytes"),
    )


def render(rows: Sequence[Row]) -> str:
    """Where and when, the errors' distribution, every case."""
    hardware = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    lines = [f"{hardware}; {versions}; {date.today().isoformat()}. Error: predicted / measured - 1.", ""]
    for name, errors in (
        ("allocated", [row.error for row in rows]),
        ("reserved", [row.reserved_error for row in rows]),
    ):
        sizes = sorted(abs(error) for error in errors if error is not None)
        if sizes:
            most = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
            median = statistics.median(sizes)
            lines.append(f"- {name}: median {median:.1%}, 90th percentile {most:.1%}, largest {sizes[-1]:.1%}")
    missed = [row.case for row in rows if row.measured is None and row.verdict is not Verdict.does_not_fit]
    lines.append(f"- out of memory though predicted to fit: {', '.join(missed) or 'none'}")
    lines += [
        "",
        "| case | predicted GiB | measured GiB | error | reserved | measured | error |",
        "|---|" + "---:|" * 6,
    ]
    lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if row.measured is None:
        return f"| {row.case} | {row.predicted / GIB:.3f} | out of memory ({row.verdict}) | | | | |"
    cells = [f"{row.predicted / GIB:.3f}", f"{row.measured / GIB:.3f}", f"{row.error:+.1%}", "", "", ""]
    if row.measured_reserved is not None:
        cells[3:] = [
            f"{row.predicted_reserved / GIB:.3f}",
            f"{row.measured_reserved / GIB:.3f}",
            f"{row.reserved_error:+.1%}",
        ]
    return f"| {row.case} | {' | '.join(cells)} |"


def write(page: Path, table: str) -> None:
    """Between the markers; ValueError without them, before anything is changed."""
    text = page.read_text()
    if not re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.DOTALL):
        raise ValueError(f"{page} has no lines {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Predicted against measured memory, case by case.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--page", type=Path, help="write the table between this page's markers instead of printing it")
    parser.add_argument("--only", default="", help="cases that contain this word")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; --device cpu tries the script", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for words in cases(arguments.device):
        if arguments.only in " ".join(words):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(words, Path(folder)))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    for rank, world_size, words in FAKE_RANKS[arguments.device]:
        if arguments.only in " ".join(words):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure_fake(rank, world_size, words, Path(folder)))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    table = render(rows)
    if arguments.page is None:
        print(table, end="")
    else:
        write(arguments.page, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
