"""Loader processes: as many as the machine can run, with enough shared memory.

A loader process writes each tensor of a batch into a separate file in /dev/shm, from which the training process maps
it. If that is full (64 MiB is a container's default), the library reports it in a thread that nobody reads, and the
training process waits for the batch until its timeout. So the room is measured before the first process starts, and a
loader process without room passes on the reason instead of the batch.
"""

from __future__ import annotations

import os
from typing import Any

from configs.errors import DataError
from trainer.plan.machine import find_machine
from trainer.plan.plan import Plan

SHARED_MEMORY = "/dev/shm"
PREFETCHED = 2
"""Batches that each process prefetches (torch's default)."""
PER_CPU = 8
"""Maximum useful number of loader processes per CPU."""
_TENSORS = 3
_SMALL = 2
"""Of a number for each row; each takes a page."""
_QUEUES = 16
"""Pages for the locks of a process's queues."""


def check_workers(num_workers: int, plan: Plan) -> None:
    """Raise DataError for loader processes that this machine cannot run. num_workers: of each rank."""
    if not num_workers:
        return
    ranks, cpus = find_machine().local_world_size or 1, len(os.sched_getaffinity(0))
    if num_workers * ranks > PER_CPU * cpus:
        raise DataError(
            f"data.num_workers={num_workers}: {num_workers * ranks} loader processes for {ranks} rank(s) on a machine"
            f" with {cpus} CPU(s); set data.num_workers={PER_CPU * cpus // ranks} or less"
        )
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return
    needed = num_workers * ranks * _bytes_of_worker(plan, page=found.f_frsize)
    free = found.f_bavail * found.f_frsize
    if free < needed:
        raise DataError(
            f"data.num_workers={num_workers}: the batches of {num_workers * ranks} loader process(es) take"
            f" {_size(needed)} of shared memory, and {SHARED_MEMORY} has {_size(free)} free; {_REMEDY}"
        )


def share(batch: Any) -> Any:
    """The Batch (or DataError), moved to shared memory; if that is full, a DataError. Called in a loader process."""
    if isinstance(batch, DataError):
        return batch
    try:
        for tensor in batch.named.values():
            if tensor is not None:
                tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        return no_room(error)
    return batch


def no_room(error: Exception) -> DataError:
    text = " ".join(str(error).split())[:200]
    return DataError(
        f"data.num_workers: {SHARED_MEMORY} has no room for what a loader process hands over ({text}); {_REMEDY}"
    )


_REMEDY = "make it larger (docker run --shm-size=1g, or --ipc=host), or set data.num_workers=0"


def _bytes_of_worker(plan: Plan, *, page: int) -> int:
    tensor = 8 * plan.batch.micro_batch_size * plan.batch.seq_len
    # One more batch is in use while the others wait.
    return page * ((-(-tensor // page) * _TENSORS + _SMALL) * (PREFETCHED + 1) + _QUEUES)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count // 2**10} KiB"
