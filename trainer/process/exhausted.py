"""Out of memory, reported in one line: which rank, in which step, and what to do about it.

torch raises its own error for a GPU, a plain RuntimeError for host memory, and Python a MemoryError; each comes with a
traceback of the place that happened to ask for the last bytes, which is seldom the one that took the others. Loading
a library and starting a thread fail with yet other errors. Needs no torch.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from configs.errors import OutOfMemory, first_line

HOST_WORDS = ("can't allocate memory", "Cannot allocate memory")
START_WORDS = (
    "can't start new thread",
    "Resource temporarily unavailable",
    "failed to map segment",
    "without setting an exception",
    "error return without exception set",
)
"""Of Python's threads, of C++'s and gloo's, of the dynamic linker, of a Python that could not even make its error."""
NEAR = 64 * 2**20
"""So many bytes below its limit, a process that fails to start has failed for want of memory: libraries swallow the
MemoryError and stumble over what it left undone, each with words of its own."""


@contextmanager
def memory_told(rank: int, step: Callable[[], int]) -> Iterator[None]:
    """Convert any out-of-memory error to OutOfMemory. step: a callback that returns the updates so far."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"rank {rank}: out of memory after {step()} updates: {first_line(error)}; memory-estimate with the"
            " same words says what to change so that it fits (docs/when-it-fails.md)"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in HOST_WORDS)


def told_at_start(error: BaseException, rank: int) -> OutOfMemory | None:
    """What to raise instead of an error outside `memory_told`; None if it is unrelated to memory."""
    starved = isinstance(error, (RuntimeError, OSError, ImportError, SystemError)) and any(
        words in str(error) for words in START_WORDS
    )
    if not starved and not is_out_of_memory(error) and not (_is_starting() and _is_near_its_limit()):
        return None
    return OutOfMemory(
        f"rank {rank}: no memory, or no further thread, for the process itself, before it trained: "
        f"{first_line(error)}; raise what limits it (ulimit -v, ulimit -u, the memory of the job, memory and pids"
        " of the container)"
    )


def _is_starting() -> bool:
    """Whether libraries are still being loaded: the loop comes last."""
    loop = sys.modules.get("trainer.run.loop")
    return loop is None or not hasattr(loop, "run")


def _is_near_its_limit() -> bool:
    """Whether the address space has been as large as `ulimit -v` allows. False where the system does not say."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak:"))
    except (OSError, ValueError):
        return False
    return peak > limit - NEAR
