"""Out of memory, reported in one line: the rank, the step, and the remedy.

torch raises its own error for a GPU, a plain RuntimeError for host memory, and Python a MemoryError. The traceback
shows the place that requested the last bytes, seldom the one that holds the others. Library loading and thread
creation fail with yet other errors. Needs no torch.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.errors import OutOfMemory, first_line

HOST_MESSAGES = ("can't allocate memory", "Cannot allocate memory")
START_MESSAGES = (
    "can't start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
    "without setting an exception",
    "error return without exception set",
)
"""Messages of Python's threads, C++'s and gloo's, the dynamic linker, and a Python that could not make its error."""
NEAR = 64 * 2**20
"""If a process fails to start with less memory than this below its limit, the cause is memory: libraries swallow the
MemoryError and fail later with other messages."""


@contextmanager
def memory_errors(rank: int, step: Callable[[], int]) -> Iterator[None]:
    """Convert any out-of-memory error to OutOfMemory. step: a callback that returns the updates so far."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"rank {rank}: out of memory after {step()} updates: {first_line(error)}; memory-estimate with the"
            " same overrides suggests changes that make it fit (docs/when-it-fails.md)"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Out of memory on a GPU or on the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(message in str(error) for message in HOST_MESSAGES)


def start_problem(error: BaseException, rank: int) -> OutOfMemory | None:
    """The error to raise for a failure outside `memory_errors`; None if it is unrelated to memory."""
    starved = isinstance(error, (RuntimeError, OSError, ImportError, SystemError)) and any(
        message in str(error) for message in START_MESSAGES
    )
    if not starved and not is_out_of_memory(error) and not (_is_starting() and _is_near_its_limit()):
        return None
    return OutOfMemory(
        f"rank {rank}: no memory, or no further thread, for the process itself, before it trained: "
        f"{first_line(error)}; raise what limits it (ulimit -v, ulimit -u, the memory of the job, memory and pids"
        " of the container)"
    )


def _is_starting() -> bool:
    """Whether libraries are still being loaded: the loop is imported last."""
    loop = sys.modules.get("trainer.run.loop")
    return loop is None or not hasattr(loop, "run")


def _is_near_its_limit() -> bool:
    """Whether the address space has reached the limit of `ulimit -v`. False if the system does not report it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak:"))
    except (OSError, ValueError):
        return False
    return peak > limit - NEAR
