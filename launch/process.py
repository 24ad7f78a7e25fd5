"""Runs a launcher's command and stays in charge of it: signals on, one error out, nothing left behind.

The first signal goes to the ranks, which finish their step and save; a launcher that got it would kill them half a
minute later, or at once. When ranks fail, each says so, and the launcher adds a page about its children: `Relay` lets
through what a person needs (everything, but of the tracebacks only the first rank's) and keeps all of it in a file.
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
    """code: the exit code, 128 + N after signal N. killed: the signal that ended the launcher itself, if one did. told:
    whether somebody asked the run to end. relay: what went to stderr. lost: a node that is gone with its ranks.
    started: False where the ranks were still waiting for their turn."""

    code: int
    killed: signal.Signals | None
    told: bool
    relay: Relay
    lost: str | None = None
    started: bool = True


def run_command(command: Command, signals: Forwarding) -> Outcome:
    """Run to the end, passing signals on. Nothing that it started is left when this returns."""
    adopt_orphans()
    others = psutil.Process().children(recursive=True)  # of a Python program that calls `cookbook.launch`
    child = subprocess.Popen(
        command.argv,
        env={**for_children(os.environ), **command.environment, LAUNCHER: str(os.getpid())},
        stderr=subprocess.PIPE,
        process_group=0,
    )
    signals.tell = partial(tell_ranks, child.pid)
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
    signals.tell = None
    killed = signal.Signals(-code) if code < 0 else None
    return Outcome(code=128 - code if killed else relay.rank_code(code), killed=killed, told=signals.told, relay=relay)


def check_port(port: int) -> None:
    """Raises EnvironmentProblem when the ranks could not meet at this port of this machine. Launchers tell it by a
    traceback, or not at all."""
    try:
        with socket.socket() as listener:
            # As torch does: what is left of connections that are closed is no hindrance, another listener is.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(
            f"launcher.master_port={port}: the ranks cannot meet there ({why}); choose another port, or leave it out: a"
            " free one is found"
        ) from None


def replace_process(command: Command) -> None:
    """Become the command: for one plain process, whose debugger needs the terminal. Does not return."""
    sys.stdout.flush()
    os.execvpe(command.argv[0], command.argv, {**for_children(os.environ), **command.environment})


class Forwarding:
    """Context in which signals are passed on: the first, and every SIGUSR1, to the ranks; where there are none yet, and
    when asked again, to the launcher's process group. With nobody to tell they end this process.

    A signal that we were started to ignore (nohup) stays ignored. In another thread than the main one, to which Python
    gives no signals, none is passed on.
    tell: passes a signal on; its second argument is whether the run was asked before.
    """

    def __init__(self) -> None:
        self.tell: Callable[[signal.Signals, bool], None] | None = None
        self.told = False
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
        if self.tell is None:
            sys.exit(128 + number)
        again, self.told = self.told and number != signal.SIGUSR1, True
        self.tell(signal.Signals(number), again)


def tell_ranks(launcher: int, number: signal.Signals, again: bool) -> None:
    """Send a signal to a launcher's ranks; to its process group where there are none yet, and when asked again."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        ranks = [] if again else rank_processes(psutil.Process(launcher))
        for rank in ranks:
            # A terminal that is closed asks to end: ranks know SIGTERM for that.
            rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not ranks:
            os.killpg(launcher, number)


def rank_processes(process: psutil.Process) -> list[psutil.Process]:
    """The ranks below a launcher: the topmost processes that have a RANK. Their own children are theirs to tell."""
    ranks: list[psutil.Process] = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ranks += [child] if "RANK" in child.environ() else rank_processes(child)
    return ranks


def ranks_are_there() -> bool:
    """Whether a launcher below this process has started a rank long enough ago for its first line."""
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
    """Ask every process below this one to end, except for the others; after GRACE_SECONDS kill those that did not."""
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
    code: the exit code of the first rank that failed, -N after signal N, where that report names it. death: that rank,
    if it was killed by a signal; the others only know that it is gone.
    """

    RANK = re.compile(r"\[rank(\d+)\]: ?")
    REPORT = re.compile(
        r"torch/distributed/elastic/.*\] (failed \(exitcode|Sending process|Received \d+ death signal)"
        r"|\[launch\.py:\d+:sigkill_handler\]"
    )
    FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
    NEEDLESS = re.compile(r"master_addr is only used for static rdzv_backend")  # torchrun, of an option nobody gave
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
        """What to show now that this line has come."""
        # Whose traceback it is, a rank's that died early or the launcher's, stands on its second line.
        before, self._undecided = self._undecided, ""
        rank = self.RANK.match(line)
        if rank:
            self._first_rank = self._first_rank or rank[1]
            wanted = rank[1] == self._first_rank
        elif self._in_report or self.REPORT.search(line) or (before and self.LAUNCHER.match(line)):
            # The launcher has nothing else to say from here on.
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
        """The exit code of the ranks, where their launcher ended with this one: torchrun always ends with 1."""
        return self.code if code > 0 and self.code is not None and self.code > 0 else code

    def told(self, text: str) -> bool:
        """Whether this has come by in one line."""
        return any(text in line for line in self._everything)

    def keep(self, path: Path) -> Path | None:
        """Add all of it to `path` if something was held back. Returns where it is; None if there is nothing more."""
        if not self._held_back:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(self._everything)
        return path
