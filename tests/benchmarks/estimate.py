"""Speed of the estimate: CPU seconds of this checkout relative to another one, in the same run.

    git worktree add /tmp/before 9ecda3c
    python -m tests.benchmarks.estimate before=/tmp/before
    python -m tests.benchmarks.estimate before=/tmp/before rounds=3 only=shape,search

Each question runs `python -m launch.estimate` in a new process, in one checkout and then in the other, each with an
empty cache. The ratio is that of the minimum CPU seconds over the rounds. The first answer is also compared with the
bare imports of torch and of the model's code.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parents[2]
IMPORTS = "import torch; from transformers.models.llama import modeling_llama"
SINGLE = "model=llama3_1_8b parallel=fsdp precision=bf16 cluster=8xh100 data.seq_len=1024 train.micro_batch_size=1"
PIPELINE = (
    "model=llama3_1_70b parallel=pipeline_fsdp parallel.pp=8 precision=bf16 cluster=8xh100 cluster.nodes=8"
    " train.micro_batch_size=1 train.gradient_accumulation_steps=512 estimate.suggest=false parallel.pipeline.schedule="
)
SEARCH = "model=llama3_1_70b precision=bf16 cluster=8xh100 cluster.nodes=128 data.seq_len=4096 estimate.search=true"
QUESTIONS: dict[str, tuple[Sequence[str], str]] = {
    "first": ([], SINGLE),
    "cached": ([SINGLE], SINGLE),
    "shape": ([SINGLE], SINGLE.replace("micro_batch_size=1", "micro_batch_size=2")),
    "length": ([SINGLE], SINGLE.replace("seq_len=1024", "seq_len=2048")),
    "gpipe": ([PIPELINE + "gpipe"], PIPELINE + "gpipe"),
    "looped_bfs": ([PIPELINE + "looped_bfs"], PIPELINE + "looped_bfs"),
    "1f1b": ([PIPELINE + "1f1b"], PIPELINE + "1f1b"),
    "search": ([], SEARCH),
}
"""Name -> (overrides of earlier questions, which are not timed; overrides of the timed question)."""


def main(words: list[str]) -> None:
    mine = dict(word.split("=", 1) for word in words)
    before, rounds = Path(mine["before"]), int(mine.get("rounds", 2))
    asked = mine["only"].split(",") if "only" in mine else list(QUESTIONS)
    bare = min(cpu_seconds(["-c", IMPORTS], HERE) for _ in range(rounds))
    print(_conditions())
    print(f"{'question':<12}{'before':>9}{'now':>9}{'ratio':>8}")
    for name in asked:
        spent = {folder: min(_ask(folder, name) for _ in range(rounds)) for folder in (before, HERE)}
        print(f"{name:<12}{spent[before]:>8.2f}s{spent[HERE]:>8.2f}s{spent[HERE] / spent[before]:>8.2f}", flush=True)
        if name == "first":
            print(f"{'  / imports':<12}{bare:>8.2f}s{spent[HERE]:>8.2f}s{spent[HERE] / bare:>8.2f}", flush=True)


def _ask(folder: Path, name: str) -> float:
    prepared, question = QUESTIONS[name]
    with tempfile.TemporaryDirectory() as cache:
        for words in prepared:
            _estimate(folder, words, cache)
        return _estimate(folder, question, cache)


def _estimate(folder: Path, words: str, cache: str) -> float:
    return cpu_seconds(["-m", "launch.estimate", *words.split(), f"data.cache_dir={cache}"], folder)


def cpu_seconds(arguments: Sequence[str], folder: Path) -> float:
    """CPU seconds of a Python process. Exit code 3 (the run does not fit) counts as an answer."""
    begun = _children()
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    surroundings.pop("PYTHONDONTWRITEBYTECODE", None)  # keep the bytecode of the libraries and of the checkout
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=surroundings, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{folder}: {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
    return _children() - begun


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _conditions() -> str:
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{versions}, {os.cpu_count()} CPU cores"


if __name__ == "__main__":
    main(sys.argv[1:])
