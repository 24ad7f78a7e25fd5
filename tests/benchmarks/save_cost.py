"""Measures how much a synchronous and an asynchronous save delay training, in one process on this machine.

python -m tests.benchmarks.save_cost
python -m tests.benchmarks.save_cost --write docs/checkpoints.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.entry_points import run_trainer
from tests.support.harness import run_ranks
from tests.support.measured import conditions, write

COMMAND = "python -m tests.benchmarks.save_cost"
STEPS, EVERY = 12, 3
WORDS = [
    "parallel=single",
    "data=synthetic",
    "data.seq_len=32",
    "model=tiny",
    "model.config.hidden_size=256",
    "model.config.intermediate_size=1024",
    "model.config.num_hidden_layers=4",
    "train.micro_batch_size=1",
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "train.eval_samples=0",
    "train.export=false",
    "cluster=cpu",
    "logging.progress=off",
]


def measure(folder: Path, *, aside: bool) -> dict[str, float]:
    """Measure one run: mean seconds over its saves, bytes of a save, and median seconds of a step."""
    run = folder / f"aside-{aside}"
    words = [*WORDS, f"checkpoint.async_save={str(aside).lower()}", f"train.run_dir={run}"]
    codes = run_ranks(1, run_trainer, words, timeout=900)
    assert codes == [0]
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Leave out the last save: no training is left to overlap with it, so it waits for its own commit.
    saves = [line for line in lines if line["kind"] == "checkpoint" and line["step"] < STEPS]
    return {
        "bytes": saves[0]["checkpoint_bytes"],
        "blocked": statistics.mean(line["checkpoint_blocked_seconds"] for line in saves),
        "seconds": statistics.mean(line["checkpoint_seconds"] for line in saves),
        "step": statistics.median(line["step_seconds"] for line in lines if line["kind"] == "step"),
    }


def table(plain: dict[str, float], aside: dict[str, float]) -> str:
    rows = [("`false`", plain), ("`true`", aside)]
    return (
        "\n".join(
            [
                f"{conditions('torch', 'safetensors')}: a checkpoint of {plain['bytes'] / 2**20:,.0f} MiB, saved"
                f" {STEPS // EVERY - 1} times in {STEPS} steps. Asynchronous saves stall training for"
                f" {aside['blocked'] / plain['blocked']:.0%} of the time.",
                "",
                "| `checkpoint.async_save` | checkpoint stall | from begin to commit | median step |",
                "| --- | --- | --- | --- |",
                *(
                    f"| {name} | {row['blocked']:.3f} s | {row['seconds']:.2f} s | {row['step']:.3f} s |"
                    for name, row in rows
                ),
            ]
        )
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with the markers")
    arguments = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        text = table(measure(Path(folder), aside=False), measure(Path(folder), aside=True))
    print(text)
    if arguments.write:
        write(arguments.write, COMMAND, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
