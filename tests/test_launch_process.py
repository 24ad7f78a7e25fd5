"""A job gets signals, returns its exit code and leaves no process behind. Its errors are shown once and saved whole."""

from __future__ import annotations

import gc
import io
import runpy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.process import Relay

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


@contextmanager
def started(child: str) -> Generator[subprocess.Popen[str], None, None]:
    """Starts a process that calls `run_command` for a child process, which is given as Python source."""
    driver = f"""
        import signal, sys
        from launch.command import Command
        from launch.process import Forwarding, run_command
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        command = Command(argv=(sys.executable, "-c", {textwrap.dedent(child)!r}), environment={{}})
        with Forwarding() as signals:
            sys.exit(run_command(command, signals).code)
    """
    running = subprocess.Popen(
        [PYTHON, "-c", textwrap.dedent(driver)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


def lines(running: subprocess.Popen[str], count: int) -> list[str]:
    """Reads the next lines as the job prints them."""
    assert running.stdout is not None
    return [running.stdout.readline() for _ in range(count)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_job_and_its_exit_code_comes_back(number: signal.Signals) -> None:
    child = """
        import signal, sys, time
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: (print("got", number), sys.exit(40 + number)))
        print("ready", flush=True)
        time.sleep(60)
    """
    with started(child) as running:
        assert lines(running, 1) == ["ready\n"]
        running.send_signal(number)
        out, _ = running.communicate(timeout=60)
    assert out == f"got {number.value}\n"
    assert running.returncode == 40 + number


RANK = """
import os, signal, sys
signal.signal(signal.{name}, lambda *_: sys.exit(0))
os.write(1, b"up\\n")
signal.pause()
"""
LAUNCHER = """
import os, signal, subprocess, sys
def note(number, frame):
    print("launcher got", number, flush=True)
    sys.exit(3)
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), note)
words = [sys.executable, "-c", {rank!r}]
ranks = [subprocess.Popen(words, start_new_session=True, env={{**os.environ, "RANK": str(k)}}) for k in range(2)]
print([rank.wait() for rank in ranks], flush=True)
{after}
sys.exit(9)
"""


@pytest.mark.parametrize(("sent", "name"), [("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGUSR1", "SIGUSR1")])
def test_ranks_are_signalled_first_and_the_launcher_is_not(sent: str, name: str) -> None:
    with started(LAUNCHER.format(rank=RANK.format(name=name), after="")) as running:
        assert lines(running, 2) == ["up\n", "up\n"]
        running.send_signal(getattr(signal, sent))
        out, _ = running.communicate(timeout=60)
    assert out == "[0, 0]\n"
    assert running.returncode == 9


def test_a_second_signal_goes_to_the_launcher() -> None:
    child = LAUNCHER.format(rank=RANK.format(name="SIGTERM"), after="signal.pause()")
    with started(child) as running:
        assert lines(running, 2) == ["up\n", "up\n"]
        running.send_signal(signal.SIGTERM)
        assert lines(running, 1) == ["[0, 0]\n"]
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=60)
    assert (out, running.returncode) == ("launcher got 15\n", 3)


def test_ranks_whose_launcher_is_killed_are_ended() -> None:
    child = """
        import os, signal, subprocess, sys
        rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
        print(rank.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with started(child) as running:
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGKILL
    assert not alive(int(out))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


TORCHRUN_STDERR = """\
a warning of rank 0
[rank1]: Traceback (most recent call last):
[rank1]:   File "trainer/run/loop.py", line 40, in run
[rank1]: ZeroDivisionError: division by zero
[rank0]: Traceback (most recent call last):
[rank0]: RuntimeError: Connection closed by peer
W1122 15:06:33.040000 27650 torch/distributed/elastic/multiprocessing/api.py:1012] Sending process 27663 closing signal
E1122 15:06:33.155000 27650 torch/distributed/elastic/multiprocessing/api.py:988] failed (exitcode: 1) local_rank: 1
Traceback (most recent call last):
  File "/usr/bin/torchrun", line 6, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer FAILED
"""
TORCHRUN_SHOWN = """\
a warning of rank 0
[rank1]: Traceback (most recent call last):
[rank1]:   File "trainer/run/loop.py", line 40, in run
[rank1]: ZeroDivisionError: division by zero
"""
ACCELERATE_STDERR = """\
data.paths=[x]: no such file
Traceback (most recent call last):
  File "/venv/bin/accelerate", line 6, in <module>
    sys.exit(main())
subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 2.
"""
EARLY_STDERR = """\
Traceback (most recent call last):
  File "/site-packages/trainer/engine/torch.py", line 3, in <module>
ImportError: libcudart.so.13
"""


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (TORCHRUN_STDERR, TORCHRUN_SHOWN),
        (ACCELERATE_STDERR, "data.paths=[x]: no such file\n"),
        (EARLY_STDERR, EARLY_STDERR),
        ("Traceback (most recent call last):\n", "Traceback (most recent call last):\n"),
    ],
)
def test_a_failure_is_reported_once_and_kept_whole(written: str, shown: str, tmp_path: Path) -> None:
    terminal = io.StringIO()
    relay = Relay(terminal)
    relay.copy(written.splitlines(keepends=True))
    assert terminal.getvalue() == shown
    log = relay.keep(tmp_path / "logs/errors.log")
    assert (log is None) == (shown == written)
    if log is not None:
        assert log.read_text() == written


def test_a_rank_that_is_through_does_not_look_for_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch, garbage collection at exit takes seconds after the run's last line."""
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    monkeypatch.setattr(sys, "argv", ["trainer", "--help"])
    monkeypatch.delitem(sys.modules, "trainer.__main__", raising=False)
    with pytest.raises(SystemExit):
        runpy.run_module("trainer", run_name="__main__")
    assert frozen == [True]
