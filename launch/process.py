"""Runs a launcher's command and supervises it: forwards signals, shows one error, leaves nothing behind.

The first signal goes to the ranks, which finish their step and save; a launcher that got it would kill them half a
minute later, or at once. When ranks fail, each prints an error, and the launcher adds a page about its children.
`Relay` shows only what a person needs (of the tracebacks only the first rank's) and keeps everything in a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TextIO

import psutil

from configs.errors import EnvironmentProblem
from launch.command import HOST, Command
from trainer.process.lifeline import LAUNCHER
from trainer.process.world import for_children

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS = 10.0
FIRST_LINE_SECONDS = 3.0
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """code: the exit code, 128 + N after signal N.
    killed: the signal that ended the launcher itself, if any.
    to_stop: whether the run was asked to end.
    relay: the copied stderr.
    lost: a node that is gone with its ranks.
    started: False if the ranks were still waiting to be started."""

    code: int
    killed: signal.Signals | None
    to_stop: bool
    relay: Relay
    lost: str | None = None
    started: bool = True


def run_command(command: Command, signals: Forwarding) -> Outcome:
    """Run to the end, forwarding signals. Everything that it started is gone when this returns."""
    adopt_orphans()
    others = psutil.Process().children(recursive=True)  # of a Python program that calls `cookbook.launch`
    child = subprocess.Popen(
        command.argv,
        env={**for_children(os.environ), **command.environment, LAUNCHER: str(os.getpid())},
        stderr=subprocess.PIPE,
        process_group=0,
    )
    signals.forward = partial(signal_ranks, child.pid)
    assert child.stderr is not None
    relay = Relay(sys.stderr)
    # A progress bar's carriage return is not the end of a line.
    lines = io.TextIOWrapper(child.stderr, errors="replace", newline="\n")
    reader = threading.Thread(target=relay.copy, args=(lines,), daemon=True)
    reader.start()
    code = child.wait()
    end_descendants(others)
    reader.join(GRACE_SECONDS)
    if not reader.is_alive():
        lines.close()
    signals.forward = None
    killed = signal.Signals(-code) if code < 0 else None
    return Outcome(
        code=128 - code if killed else relay.rank_code(code), killed=killed, to_stop=signals.stop_requested, relay=relay
    )


def check_port(port: int) -> None:
    """Raises EnvironmentProblem if the ranks cannot meet at this port of this machine. Launchers report that with a
    traceback, or not at all."""
    try:
        with socket.socket() as listener:
            # As torch does: closed connections in TIME_WAIT do not block the port, another listener does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(
            f"launcher.master_port={port}: the ranks cannot meet there ({why}); choose another port, or leave it out: a"
            " free one is found"
        ) from None


def replace_process(command: Command) -> None:
    """Become the command, for a single plain process whose debugger needs the terminal. Does not return."""
    sys.stdout.flush()
    os.execvpe(command.argv[0], command.argv, {**for_children(os.environ), **command.environment})


class Forwarding:
    """Context that forwards signals: the first one, and every SIGUSR1, to the ranks; before ranks exist, and on a
    repeated request, to the launcher's process group. Without any receiver they end this process.

    A signal that we were started to ignore (nohup) stays ignored. Python delivers no signals to other threads than the
    main one, so none is forwarded there.
    forward: forwards a signal; its second argument is whether the run was asked before.
    """

    def __init__(self) -> None:
        self.forward: Callable[[signal.Signals, bool], None] | None = None
        self.stop_requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        ours = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._forward) for number in ours}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _frame: object) -> None:
        if self.forward is None:
            sys.exit(128 + number)
        again, self.stop_requested = self.stop_requested and number != signal.SIGUSR1, True
        self.forward(signal.Signals(number), again)


def signal_ranks(launcher: int, number: signal.Signals, again: bool) -> None:
    """Send a signal to a launcher's ranks; to its process group if there are none yet, and on a repeated request."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        ranks = [] if again else rank_processes(psutil.Process(launcher))
        for rank in ranks:
            # A closed terminal asks the run to end: ranks treat SIGTERM that way.
            rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not ranks:
            os.killpg(launcher, number)


def rank_processes(process: psutil.Process) -> list[psutil.Process]:
    """The ranks below a launcher: the topmost processes with a RANK. Each rank handles its own children."""
    ranks: list[psutil.Process] = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ranks += [child] if "RANK" in child.environ() else rank_processes(child)
    return ranks


def ranks_are_there() -> bool:
    """Whether a launcher below this process started a rank long enough ago for the rank's first line."""
    with contextlib.suppress(psutil.Error):
        return any(time.time() - rank.create_time() > FIRST_LINE_SECONDS for rank in rank_processes(psutil.Process()))
    return False


def adopt_orphans() -> None:
    """Make ranks whose launcher has died children of this process (Linux), so that they can be found and ended.

    Launchers start ranks in sessions of their own: a launcher that is killed leaves them training, holding the GPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(others: Sequence[psutil.Process] = ()) -> None:
    """Ask every process below this one to end, except the others; kill the rest after GRACE_SECONDS."""
    left = [process for process in psutil.Process().children(recursive=True) if process not in others]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=GRACE_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Relay:
    """Copies a launcher's stderr, without the repetitions of a failure.

    Held back: the tracebacks of all ranks but the first that fails, and the launcher's report about its children.
    code: exit code of the first failed rank, -N after signal N, if that report contains it. death: that rank, if a
    signal killed it; the other ranks only know that it is gone.
    """

    RANK = re.compile(r"\[rank(\d+)\]: ?")
    REPORT = re.compile(
        r"torch/distributed/elastic/.*\] (failed \(exitcode|Sending process|Received \d+ death signal)"
        r"|\[launch\.py:\d+:sigkill_handler\]"
    )
    FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
    NEEDLESS = re.compile(r"master_addr is only used for static rdzv_backend")  # torchrun warns of an option nobody set
    TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
    LAUNCHER = re.compile(r'\s+File "[^"]*(torchrun|accelerate|deepspeed|torch/distributed/run\.py)"')
    KEPT_LINES = 20_000

    def __init__(self, shown: TextIO) -> None:
        self._shown = shown
        self._everything: deque[str] = deque(maxlen=self.KEPT_LINES)
        self._first_rank: str | None = None
        self._in_report = False
        self._undecided = ""
        self._held_back = False
        self.code: int | None = None
        self.death: str | None = None

    def copy(self, lines: Iterable[str]) -> None:
        """Read to the end, showing each line at once."""
        for line in lines:
            self.add(line)
        self.end()

    def add(self, line: str) -> None:
        self._everything.append(line)
        self._shown.write(self._wanted(line))
        self._shown.flush()

    def end(self) -> None:
        """No line follows."""
        self._shown.write(self._undecided)
        self._undecided = ""

    def _wanted(self, line: str) -> str:
        """The lines to show once this line has arrived."""
        # The second line shows whether the traceback belongs to a rank that died early or to the launcher.
        before, self._undecided = self._undecided, ""
        rank = self.RANK.match(line)
        if rank:
            self._first_rank = self._first_rank or rank[1]
            wanted = rank[1] == self._first_rank
        elif self._in_report or self.REPORT.search(line) or (before and self.LAUNCHER.match(line)):
            # From here on the launcher has nothing else to say.
            self._in_report, wanted = True, False
            failed = self.FAILED.search(line)
            if failed and self.code is None:
                self.code = int(failed[1])
                if self.code < 0:
                    self.death = f"rank {failed[2]} was killed by {signal.Signals(-self.code).name}"
        elif self.NEEDLESS.search(line):
            return before
        elif self.TRACEBACK.match(line):
            self._undecided = line
            return before
        else:
            return before + line
        self._held_back = self._held_back or not wanted
        return line if wanted else ""

    def rank_code(self, code: int) -> int:
        """The ranks' exit code, if their launcher ended with this one: torchrun always ends with 1."""
        return self.code if code > 0 and self.code is not None and self.code > 0 else code

    def contains(self, text: str) -> bool:
        """Whether one line contained this text."""
        return any(text in line for line in self._everything)

    def keep(self, path: Path) -> Path | None:
        """Append all of it to `path` if something was held back. Returns the path, or None."""
        if not self._held_back:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(self._everything)
        return path
