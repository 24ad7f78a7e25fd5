"""Out of memory, told in one line: which rank, in which step, and what to do about it.

torch raises its own error for a GPU, a plain RuntimeError for host memory, and Python a MemoryError; each comes with a
traceback of the place that happened to ask for the last bytes, which is seldom the one that took the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from configs.errors import OutOfMemory

HOST_WORDS = ("can't allocate memory", "Cannot allocate memory")


@contextmanager
def memory_told(rank: int, step: Callable[[], int]) -> Iterator[None]:
    """Raise OutOfMemory in place of whatever says that memory is used up. step: updates so far, asked when it is."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutOfMemory(
            f"rank {rank}: out of memory after {step()} updates: {first_line.rstrip('.')}; memory-estimate with the"
            " same words says what to change so that it fits (docs/when-it-fails.md)"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error) for words in HOST_WORDS)
