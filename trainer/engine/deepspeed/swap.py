"""A run's own swap folder on an NVMe disk, which is deleted however the run ends.

    NVME_PATH/swap-0123456789ab          DeepSpeed's files, one folder per rank in it
    NVME_PATH/swap-0123456789ab.lock     held by each of its ranks

The files are useless to a later start, which reads its states from a checkpoint, and are as large as these states. A
killed run cannot delete them; the next start on that disk does. The lock shows whether the owner is alive: the kernel
holds it and releases it with the process, also after SIGKILL, so no living run loses its files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from trainer.process.runtime import Runtime

_LOCK = ".lock"


class SwapFolder:
    """A folder of this run alone below `parallel.offload.nvme_path`, the same name on every rank and node."""

    def __init__(self, nvme_path: str, runtime: Runtime) -> None:
        """A collective. The disk was found writable before."""
        root = Path(nvme_path).expanduser().resolve()
        root.mkdir(parents=True, exist_ok=True)
        if runtime.local_rank == 0:
            remove_dead(root)
        self.path = root / runtime.broadcast(f"swap-{uuid.uuid4().hex[:12]}")
        self._rank = runtime.rank
        self._lock = open(_lock_of(self.path), "a")  # noqa: SIM115  closing it gives the lock back
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Delete this rank's swap files, and the folder with the last of its ranks. No collective."""
        # Bottom up, so a folder comes after its contents. `os.walk` skips entries that another rank, which closes at
        # the same time, has already deleted.
        for folder, _, _ in os.walk(self.path, topdown=False):
            if Path(folder).name == f"rank{self._rank}":
                shutil.rmtree(folder, ignore_errors=True)
            else:
                with suppress(OSError):  # another rank's files are still there
                    os.rmdir(folder)
        if not self.path.exists():
            _lock_of(self.path).unlink(missing_ok=True)
        self._lock.close()


def remove_dead(root: Path) -> None:
    """Delete the swap folders below `root` that no living process holds. A folder without a lock is not ours."""
    for path in root.glob(f"swap-*{_LOCK}"):
        with suppress(OSError), open(path, "a") as lock:  # held; deleted by another start just now; another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_name(path.name.removesuffix(_LOCK)), ignore_errors=True)
            path.unlink()


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)
