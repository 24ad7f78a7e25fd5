"""Writes the tables and pictures of real runs for docs/comparison.md and docs/profiling.md."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.load import expand_sweep
from launch.compare import find_runs
from launch.comparison.page import tables
from launch.comparison.runs import find_reference
from launch.comparison.table import setting

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = ("comparison-loss.png", "comparison-speed.png")
PROFILE_PICTURE = "profiling-memory.png"
MIB = 2**20


def comparison(overrides: str) -> str:
    """Runs a comparison; its setting, tables and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        _launch("compare", *shlex.split(overrides), f"train.run_dir={folder}/compared")
        return show_comparison(Path(folder) / "compared")


def show_comparison(folder: Path) -> str:
    """The same of a comparison that was made."""
    runs = find_runs(folder)
    reference = find_reference(runs)
    for name in PICTURES:
        shutil.copyfile(folder / name, DOCS / name)
    shared = "\n".join(f"- {line}" for line in setting(runs, reference))
    drawn = "\n\n".join(f"![{Path(name).stem}]({name})" for name in PICTURES)
    return "\n\n".join([shared, tables(runs, reference), drawn])


def check_comparison(overrides: str, text: str) -> None:
    """Every run is through, equal to the reference up to float32's rounding, and took about what was predicted."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = [row for row in rows if len(row) == 10][2:]
    assert [row[0] for row in table] == [
        run[0].removeprefix("parallel=") for run in expand_sweep(shlex.split(overrides))
    ]
    assert table[0][1] == "the reference"
    assert all(float(row[4]) < 1e-5 and float(row[5]) < 1e-5 for row in table[1:]), "not the same training"
    assert all(abs(float(row[8]) / float(row[9]) - 1) < 0.1 for row in table), "predictions are off"
    assert "- **" not in text, "a run is not through"
    assert all((DOCS / name).exists() and name in text for name in PICTURES)


def profiled(overrides: str) -> str:
    """Runs a profiled training; the picture of its memory, and the peaks in a sentence."""
    with tempfile.TemporaryDirectory() as folder:
        _launch(*shlex.split(overrides), "profile=true", f"train.run_dir={folder}/run")
        return show_profiled(Path(folder) / "run/profile")


def show_profiled(folder: Path) -> str:
    """The same of a run that was made."""
    shutil.copyfile(folder / "memory.png", DOCS / PROFILE_PICTURE)
    sentences: list[str] = []
    for rank in json.loads((folder / "memory.json").read_text()):
        measured = max(max(part["bytes"]) for part in rank["measured"]) / MIB
        predicted = max(moment["bytes"] for moment in rank["predicted"]) / MIB
        sentences.append(f"Rank {rank['rank']}: peak {measured:.2f} MiB measured, {predicted:.2f} MiB predicted.")
    return f"![memory of two steps, predicted and measured]({PROFILE_PICTURE})\n\n{' '.join(sentences)}"


def check_profiled(overrides: str, text: str) -> None:
    assert (DOCS / PROFILE_PICTURE).exists() and f"]({PROFILE_PICTURE})" in text
    numbers = [float(word) for word in text.split() if word.replace(".", "", 1).isdigit()]
    assert len(numbers) >= 2 and len(numbers) % 2 == 0
    assert all(abs(b / a - 1) < 0.05 for a, b in zip(numbers[::2], numbers[1::2], strict=True)), overrides


def _launch(*overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "launch", *overrides], check=True, stdout=subprocess.DEVNULL)
