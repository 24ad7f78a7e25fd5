"""Ends the job when a rank is stuck: reports the rank by name, and records the stacks of all ranks.

    RUN_DIR/logs/stacks-rank-00003.txt    where each thread of that rank was
    RUN_DIR/logs/position-rank-00003.json its activity, its collective, and when it last moved

The first to notice requests the stacks: a rank whose collective exceeded `train.timeout_minutes`, or a rank whose own
main thread has not moved for that long. A thread on every rank sees the request (a file, because the process group no
longer works) and writes down its rank's position, which distinguishes a waiting rank from a stuck one. A rank without
an answer is stopped or its machine is gone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

from configs.errors import EXIT_FAILED, CookbookError, RankStuck
from trainer.process.disks import writing
from trainer.process.files import replace_text
from trainer.process.runtime import Runtime

T = TypeVar("T")

CALL = "call-for-stacks"
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
# Functions of torch.distributed that wait for other ranks.
_COLLECTIVES = re.compile(r"all_|reduce|gather|scatter|broadcast|barrier|^send|^recv|monitored")
_TORCH = os.path.join("torch", "distributed", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """moved: seconds since the main thread last moved. collective: the one that it waits in; None outside of one. line:
    innermost line of the program outside torch."""

    doing: str
    moved: float
    collective: str | None
    line: str


class _Marks:
    """The main thread's activity, and its start. Each process has one main thread, hence one object."""

    def __init__(self) -> None:
        self.doing, self.since = "start", time.monotonic()


_marks = _Marks()


def at(doing: str) -> None:
    """The main thread begins this activity. The cost is negligible."""
    _marks.doing, _marks.since = doing, time.monotonic()


def watched(items: Iterable[T], doing: str) -> Iterator[T]:
    """The same items; each counts as progress."""
    for item in items:
        at(doing)
        yield item


class Watchdog:
    """Context of a run on every rank."""

    def __init__(self, run_dir: Path, runtime: Runtime, *, timeout_minutes: float) -> None:
        self._folder, self._runtime = run_dir / "logs", runtime
        self._limit = timeout_minutes * 60
        self._pause = min(5.0, self._limit / 20)
        self._ended = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        """A collective: no rank may see a request from an earlier start of the run."""
        self._runtime.agree(self._clear)
        at("start")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if error is None or isinstance(error, CookbookError) or not _TIMED_OUT.search(str(error)):
            return
        self._call()
        self._answer(trace)
        raise RankStuck(self._verdict()) from None

    def _clear(self) -> None:
        if self._runtime.is_main:
            with writing(self._folder.parent):
                self._folder.mkdir(exist_ok=True)
                for old in (self._folder / CALL, *self._folder.glob("*-rank-*")):
                    old.unlink(missing_ok=True)

    def _watch(self) -> None:
        while not self._ended.wait(self._pause):
            if (self._folder / CALL).exists():
                self._answer()
                # A rank that can end by itself does so: by the exception of its collective.
                if not self._ended.wait(4 * self._pause + 5):
                    os._exit(EXIT_FAILED)
            # Collectives have the same limit: a rank that waits in one gets its exception a moment later.
            elif time.monotonic() - _marks.since > self._limit + 2 * self._pause:
                self._call()
                self._answer()
                sys.stderr.write(self._verdict() + "\n")
                sys.stderr.flush()
                os._exit(EXIT_FAILED)

    def _call(self) -> None:
        (self._folder / CALL).touch()

    def _answer(self, trace: TracebackType | None = None) -> None:
        """Stacks of all threads, then the position, so a reader of the position finds complete stacks. trace: of a main
        thread that left its collective by an exception."""
        rank = self._runtime.rank
        with open(self._folder / f"stacks-rank-{rank:05d}.txt", "w") as file:
            if trace is not None:
                file.write("Main thread, until its collective timed out (most recent call last):\n")
                file.writelines(traceback.format_tb(trace))
                file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        replace_text(self._folder / f"position-rank-{rank:05d}.json", json.dumps(asdict(self._position(trace))))

    def _position(self, trace: TracebackType | None) -> Position:
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        frame = trace.tb_frame if trace is not None else sys._current_frames().get(self._main)
        return Position(
            doing=_marks.doing,
            moved=round(time.monotonic() - _marks.since, 1),
            collective=_collective(frame),
            line=_line(frame),
        )

    def _verdict(self) -> str:
        """One line: the stuck ranks, and where. Waits until every rank has had time to answer."""
        time.sleep(2 * self._pause + 1)
        silent, elsewhere, waiting = [], [], []
        for rank in range(self._runtime.world_size):
            file = self._folder / f"position-rank-{rank:05d}.json"
            if not file.exists():
                silent.append(rank)
                continue
            position = Position(**json.loads(file.read_text()))
            (waiting if position.collective is not None else elsewhere).append((rank, position))
        blamed = [f"rank {rank} does not answer at all (stopped, or its machine is gone)" for rank in silent]
        blamed += [
            f"rank {rank} has not moved for {position.moved:.0f} s in {position.doing}, at {position.line}"
            for rank, position in elsewhere
        ]
        blamed += [
            f"rank {rank} waits in {position.collective or position.line} during {position.doing}"
            for rank, position in waiting[:1]
        ]
        return f"stuck for {self._limit / 60:g} min: {'; '.join(blamed)}; stacks of all ranks: {self._folder}"


def _collective(frame: FrameType | None) -> str | None:
    """The outermost function of torch.distributed in which the thread waits for other ranks."""
    found = None
    while frame is not None:
        if _TORCH in frame.f_code.co_filename and _COLLECTIVES.search(frame.f_code.co_name):
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def _line(frame: FrameType | None) -> str:
    """file:line of the innermost frame outside of installed packages."""
    innermost = frame
    while frame is not None:
        if "site-packages" not in frame.f_code.co_filename and "<frozen" not in frame.f_code.co_filename:
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return f"{innermost.f_code.co_filename}:{innermost.f_lineno}" if innermost else "its end"
