"""If nobody reads the output, the terminal is closed or the log's disk is full, the run continues. Its own end decides
the exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from configs.errors import EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from tests.support.harness import run_ranks
from tests.support.parity import words
from trainer.__main__ import main
from trainer.process.status import read_status

ROOT = Path(__file__).parent.parent
SETTINGS = ("model.config.n_layer=1", "cluster=cpu", "train.export=false", "checkpoint.every=2")


def overrides(run: Path, layout: str, *more: str, steps: int = 3) -> list[str]:
    return words("gpt2", layout, "fp32", steps, *SETTINGS, f"train.run_dir={run}", *more)


def start_unheard(words: list[str], full: bool) -> int:
    """Runs the trainer without a reader of its output and returns the exit code.

    full: whether the output goes to a full disk; otherwise it goes to a pipe without a reader.
    """
    if full:
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        read, target = os.pipe()
        os.close(read)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    return main(words)


@pytest.mark.parametrize("full", [True, False])
def test_a_run_that_nobody_hears_is_finished(full: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(2, start_unheard, overrides(run, "ddp"), full) == [EXIT_FINISHED] * 2
    assert read_status(run)["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        # Closes the pipe like `head`, but always before the first write.
        ("--cfg job | true", EXIT_FINISHED, ""),
        ("--cfg job > /dev/full", EXIT_FAILED, "standard output: cannot be written (No space left on device); what"),
        ("--cfg job >&-", EXIT_FINISHED, ""),
        ("no.such=1 2> /dev/full", EXIT_BAD_CONFIG, ""),
    ],
)
def test_an_entry_point_whose_output_is_lost(command: str, code: int, message: str) -> None:
    shell = f"set -o pipefail; sleep 0.2 | {sys.executable} -m trainer {command}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == bool(message), done.stderr


def test_a_closed_terminal_stops_a_launched_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    master, terminal = pty.openpty()

    def own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    given = overrides(run, "single", "launcher=torchrun", "logging.progress=lines", steps=100_000)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", *given],
        cwd=ROOT,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(terminal)
    deadline, heard = time.monotonic() + 300, b""
    while b"step 2/" not in heard:
        assert time.monotonic() < deadline and job.poll() is None, heard.decode()
        with contextlib.suppress(OSError):
            heard += os.read(master, 4096)
    os.close(master)
    assert job.wait(timeout=300) == EXIT_STOPPED
    status = read_status(run)
    assert (status["state"], status["exit_code"]) == ("stopped", EXIT_STOPPED), status
    assert list((run / "checkpoints").glob("step-*"))


WAITS = """
import threading, time
from configs import waiting
from configs.output import announce
announce("the first part")
with waiting.on("something in it"):
    time.sleep(4)
time.sleep(2.5)
waiting.clear()
print("an answer", flush=True)
others = []
announce("others that write soon", until=lambda: others)
others.append("a line")
time.sleep(1.5)
with waiting.on("called from a script"):
    time.sleep(4)
print(f"{threading.active_count()} thread", flush=True)
"""


def test_a_terminal_shows_how_long_it_has_been_waited(tmp_path: Path) -> None:
    """The time is updated every second until there is an answer or another process writes. A file only gets lines."""
    command = [sys.executable, "-c", WAITS]
    master, terminal = pty.openpty()
    subprocess.run(command, cwd=ROOT, stdout=terminal, stderr=terminal, check=True)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    first, waited, said, others, end = shown.decode().split("\n")
    assert first == "preparing  the first part\r" and said == "preparing  others that write soon\r" and not end
    # On a machine with other work a second may be shown late.
    inside, outside = (re.search(rf"{text}  \d s\r", waited) for text in ("something in it", " {9}"))
    assert inside and outside and inside.start() < outside.start()
    assert waited.endswith("\r\x1b[Kan answer\r")
    before, _, after = others.partition("called from a script")
    assert " s\r" not in before and re.search(r"called from a script  \d s\r", others)
    assert after.endswith("\r\x1b[K1 thread\r")
    file = tmp_path / "file"
    with file.open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, check=True)
    lines = ["preparing  the first part", "an answer", "preparing  others that write soon", "1 thread"]
    assert file.read_text().splitlines() == lines
