"""A rank ends with its launcher: if a process between it and the program that the user started is gone, the rank is
asked to stop, and saves.

    python -m launch -> torchrun -> rank          deepspeed -> deepspeed's launch.py -> rank

A killed launcher cannot signal its ranks, which run in their own sessions and would train on, holding the GPUs and the
run folder. So each rank checks the chain of its parents every second. The chain ends at the topmost launcher: above it
are shells and terminals, which may go (`nohup`). A process without a launcher has no chain.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil

from trainer.process.world import speaks_for_node

LAUNCHER = "COOKBOOK_LAUNCHER"
"""Variable with the process id of the `python -m launch` that supervises this rank."""
SECONDS = 1.0
PROGRAMS = {"torchrun", "deepspeed", "accelerate"}
MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "accelerate.commands.launch",
}
_lost: list[str] = []
_watching = threading.Lock()


def lost() -> str | None:
    """The lost process; None while the chain is intact."""
    return _lost[0] if _lost else None


def watch() -> None:
    """Watch the chain from now on, in a thread. Does nothing in a process without a launcher."""
    chain = _chain()
    given = os.environ.get(LAUNCHER, "")
    if given.isdigit() and not any(process.pid == int(given) for process in chain):
        _stop(f"its launcher (pid {given}) is gone")
    elif len(chain) > 1 and _watching.acquire(blocking=False):  # once per process
        threading.Thread(target=_watch, args=(chain,), name="lifeline", daemon=True).start()


def _chain() -> list[psutil.Process]:
    """This process and its parents, up to the topmost launcher."""
    chain = [psutil.Process()]
    with contextlib.suppress(psutil.Error):
        chain += chain[0].parents()
    given = os.environ.get(LAUNCHER)
    ends = [place for place, process in enumerate(chain) if place and (str(process.pid) == given or _starts(process))]
    return chain[: max(ends, default=0) + 1]


def _starts(process: psutil.Process) -> bool:
    """Whether a process is a launcher, by its command line."""
    try:
        arguments = process.cmdline()[:6]
    except psutil.Error:
        return False
    if any(Path(word).name in PROGRAMS for word in arguments[:2]):
        return True
    return any(option == "-m" and module in MODULES for option, module in pairwise(arguments))


def _watch(chain: list[psutil.Process]) -> None:
    while True:
        time.sleep(SECONDS)
        for child, parent in pairwise(chain):
            try:
                # The system gives an orphan to another parent. Process ids may be reused.
                above = os.getppid() if child is chain[0] else child.ppid()
            except psutil.Error:
                above = None
            if above != parent.pid:
                _stop(f"its launcher (pid {parent.pid}) is gone")
                return


def _stop(reason: str) -> None:
    """Ask this process to stop. A run under way saves; before that it ends at once, as after any SIGTERM."""
    _lost.append(reason)
    if speaks_for_node():
        with contextlib.suppress(OSError):  # the launcher may have held the other end
            os.write(2, f"rank {os.environ.get('RANK', '0')}: {reason}; the run saves and ends\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
