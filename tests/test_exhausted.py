"""A rank that runs out of memory ends with one line that names it and exit code 1. No other rank waits forever."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import EXIT_FAILED
from tests.support import entry_points
from tests.support.harness import RankFailed, run_ranks
from tests.support.parity import words
from trainer.process.exhausted import is_out_of_memory, start_problem
from trainer.process.status import read_status

MIB = 2**20


def test_a_process_without_memory_says_so(tmp_path: Path) -> None:
    """Embedding, head and logits of 400,000 vocabulary entries, with gradients and moments, exceed the memory limit."""
    run = tmp_path / "run"
    large = ("model.config.vocab_size=400000", "train.eval_samples=0", "train.export=false", f"train.run_dir={run}")
    with pytest.raises(RankFailed, match=f"exit code {EXIT_FAILED}"):
        run_ranks(1, entry_points.start_and_exhaust, words("llama", "single", "fp32", 3, *large), 0, 600 * MIB)
    status = read_status(run)
    assert (status["state"], status["exit_code"], status["retry"]) == ("failed", EXIT_FAILED, False)
    reason = str(status["reason"])
    assert reason.startswith("rank 0: out of memory after 0 updates: ")
    assert "memory-estimate with the same overrides" in reason
    assert "\n" not in reason


def test_the_rank_without_memory_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RankFailed):
        run_ranks(
            2, entry_points.start_and_fail, words("llama", "ddp", "fp32", 5, f"train.run_dir={run}"), 1, "an allocation"
        )
    assert str(read_status(run)["reason"]).startswith(
        "rank 1: out of memory after 2 updates: planted in an allocation;"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("Connection closed by peer"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("limit", [300 * MIB, 700 * MIB])
def test_a_process_that_cannot_load_its_libraries_says_so(limit: int, tmp_path: Path) -> None:
    """The linker hits the first limit, and Python hits the second one during the imports."""
    words = ["data=synthetic", "parallel=single", "train.steps=2", f"train.run_dir={tmp_path / 'run'}"]
    ended = subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert ended.returncode == EXIT_FAILED
    said = "rank 0: no memory, or no further thread, for the process itself, before it trained: "
    lines = ended.stderr.splitlines()
    assert sum(line.startswith(said) for line in lines) == 1, ended.stderr
    # A library's finalizer may lack memory too. Python reports that as ignored, at any moment until the exit.
    assert "Traceback" not in ended.stderr.partition("Exception ignored")[0], ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("Resource temporarily unavailable"), True),
        (BlockingIOError(11, "Resource temporarily unavailable"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (SystemError("<built-in function __build_class__> returned NULL without setting an exception"), True),
        (SystemError("error return without exception set"), True),
        (MemoryError(), True),
        (ImportError("No module named 'torch'"), False),
        (RuntimeError("Connection reset by peer"), False),
    ],
)
def test_what_counts_as_no_room_for_the_process(error: Exception, expected: bool) -> None:
    problem = start_problem(error, 3)
    assert (problem is not None and str(problem).startswith("rank 3: ")) is expected
