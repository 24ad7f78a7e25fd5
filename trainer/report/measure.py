"""The clock of a training step, and its memory.

A GPU runs behind the program: a call returns when its kernels are queued. A clock that is read at that moment would
attribute their time to the next operation that waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import record_function

from trainer.process import watchdog


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Wall time of one step and of its parts. The rest of `step` is the loop's own work."""

    step: float
    data: float
    forward_backward: float
    optimizer: float


class StepTimer:
    """Times one step after another:

        with timer.data(): ...
        with timer.forward_backward(): ...
        with timer.optimizer(): ...
        seconds = timer.finish()

    forward_backward and optimizer end with a wait for the GPU. The first costs nothing if the loss is read next, which
    waits too. The second costs the work that the program could have queued meanwhile: the GPU idles until the first
    kernel of the next step arrives, about the time to fetch a batch.
    """

    def __init__(self, device: torch.device, on_part: Callable[[str], None] = lambda _: None) -> None:
        """on_part: called with the name of each part as it begins."""
        self._on_part = on_part
        self._cuda = device if device.type == "cuda" else None
        self._parts = {"data": 0.0, "forward_backward": 0.0, "optimizer": 0.0}
        self._start: float | None = None

    @contextmanager
    def data(self) -> Iterator[None]:
        with self._part("data"):
            yield

    @contextmanager
    def forward_backward(self) -> Iterator[None]:
        with self._part("forward_backward"):
            yield
            self._wait()

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        with self._part("optimizer"):
            yield
            self._wait()

    def finish(self) -> StepSeconds:
        """Seconds since the step's first part began. The next part begins a new step."""
        now = time.perf_counter()
        seconds = StepSeconds(step=now - (self._start if self._start is not None else now), **self._parts)
        self._parts = dict.fromkeys(self._parts, 0.0)
        self._start = None
        return seconds

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        watchdog.at(name.replace("_", " and "))
        self._on_part(name)
        start = time.perf_counter()
        if self._start is None:
            self._start = start
        with record_function(name):  # its name in a trace; nothing where no profiler listens
            yield
        self._parts[name] += time.perf_counter() - start

    def _wait(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """Largest memory of this process so far. allocated, reserved: of torch's CUDA allocator, null on the CPU.
    host: resident set of the process, null where the system does not tell."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    host_bytes: int | None


def peak_memory(device: torch.device) -> PeakMemory:
    cuda = device.type == "cuda"
    return PeakMemory(
        allocated_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if cuda else None,
        host_bytes=_host_peak(),
    )


def _host_peak(status: Path = Path("/proc/self/status")) -> int | None:
    # getrusage would return the launcher's peak if that was larger: it survives fork and exec.
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None
