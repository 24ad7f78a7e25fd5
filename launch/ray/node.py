"""The actor of one node: starts that node's launcher, forwards its output, and ends all of it.

The actor's methods return at once, so a signal never waits. The ranks watch its process (`trainer.process.lifeline`):
when Ray ends or loses it, they save and end.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from configs.errors import CookbookError
from configs.load import load_config
from launch.command import Rendezvous, build_command
from launch.process import GRACE_SECONDS, adopt_orphans, end_descendants, signal_ranks
from launch.ray.record import read_state
from slurm.supervise import free_port
from trainer.make_plan import make_plan
from trainer.plan.machine import find_machine
from trainer.process.lifeline import LAUNCHER
from trainer.process.world import for_children

SHARED_SECONDS = 10.0  # delay until a network file system shows a new file
OUT, ERR = 1, 2
# Ray sets these in its workers: a thread count that follows the bundle, and its own debugger.
OF_RAY = ("OMP_NUM_THREADS", "PYTHONBREAKPOINT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """overrides: of the run, including train.run_dir. token: content of RUN_DIR/ray at this start. root: working
    directory of the ranks. environment: further variables of the ranks."""

    overrides: list[str]
    config_dir: str | None
    run_dir: str
    token: str
    root: str
    environment: Mapping[str, str]
    rendezvous: Rendezvous


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """lines: new output of the launcher and its ranks, each line to OUT or ERR. code: exit code of the launcher, once
    all of it has ended."""

    lines: list[tuple[int, str]]
    code: int | None


class Node:
    def __init__(self) -> None:
        adopt_orphans()
        self._child: subprocess.Popen[bytes] | None = None
        self._readers: list[threading.Thread] = []
        self._lines: deque[tuple[int, str]] = deque()
        self._swept = False

    def place(self) -> tuple[str, int]:
        """This node's address, and a free port of it."""
        from ray.util import get_node_ip_address

        return get_node_ip_address(), free_port()

    def start(self, part: Part) -> list[str]:
        """Start the ranks. Returns the reason if this node cannot."""
        run_dir, overrides = Path(part.run_dir), part.overrides
        deadline = time.monotonic() + SHARED_SECONDS
        while read_state(run_dir).get("token") != part.token:
            if time.monotonic() > deadline:
                return [
                    f"train.run_dir={run_dir}: node {self.place()[0]} does not see what was written there; choose a"
                    " folder on a file system that all nodes share"
                ]
            time.sleep(0.2)
        own = {name: value for name, value in os.environ.items() if name not in OF_RAY}
        environment = for_children({**own, **part.environment})
        root = part.root if Path(part.root).is_dir() else run_dir
        try:
            with contextlib.chdir(root):  # relative paths of models and adapters are resolved here too
                config = load_config(overrides, config_dir=part.config_dir)
                plan = make_plan(config, replace(find_machine(), world_size=None, local_world_size=None))
            command = build_command(
                config,
                plan,
                overrides,
                run_dir=run_dir,
                rendezvous=part.rendezvous,
                config_dir=part.config_dir,
                environment=environment,
            )
        except CookbookError as error:
            return list(error.problems)
        self._child = subprocess.Popen(
            command.argv,
            cwd=root,
            env={**environment, **command.environment, LAUNCHER: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        for number, stream in ((OUT, self._child.stdout), (ERR, self._child.stderr)):
            assert stream is not None
            self._readers.append(threading.Thread(target=self._read, args=(number, stream), daemon=True))
            self._readers[-1].start()
        return []

    def poll(self) -> Said:
        assert self._child is not None
        code = self._child.poll()
        if code is not None and not self._swept:
            self._swept = True
            end_descendants()
            for reader in self._readers:
                reader.join(GRACE_SECONDS)
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        return Said(lines=lines, code=code)

    def stop(self) -> None:
        """Ask the ranks to save and end. Always SIGTERM: processes of a cluster that Ray starts here do not receive
        SIGINT."""
        if self._child is not None and self._child.poll() is None:
            signal_ranks(self._child.pid, signal.SIGTERM, False)

    def end(self) -> None:
        """End everything, with or without a checkpoint."""
        end_descendants()

    def _read(self, number: int, stream: IO[bytes]) -> None:
        # A progress bar's carriage return is not the end of a line.
        for line in io.TextIOWrapper(stream, errors="replace", newline="\n"):
            self._lines.append((number, line))
