"""Runs commands without start-up time: python and the launchers are forks of a process that has imported torch.

    subprocess.run(["bash", "-c", "python -m launch parallel=fsdp"], env=programs().environment())

`programs()` is a folder for the head of PATH, with python, torchrun, deepspeed and other programs. Each program asks
this process for a fork of the harness's server. It passes on its arguments, environment, folder, network, files and
signals, and exits with the fork's exit code. A fork has this python as `sys.executable`, so a launcher starts its ranks
in the same way.

One thing differs from an interpreter: the parent of a fork is the server. A rank therefore does not watch its launcher,
and a launcher does not find its ranks. Tests of signals, kills and imports start interpreters.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tests.support.harness import fork
from trainer.process.lifeline import LAUNCHER

BIN = Path(sys.executable).parent
CLONE_NEWNET = 0x40000000
SCRIPTS = ("torchrun", "deepspeed", "accelerate", "memory-estimate", "cookbook")
# With -I -S the program starts in 10 ms. A signal that ended the fork ends the program too.
PROGRAM = """\
#!{python} -IS
import json, os, signal, socket, sys
words = [sys.argv[0], *sys.argv[1:]]
if os.path.basename(words[0]).startswith("python"):
    rest = words[2:] if words[1:2] == ["-u"] else words[1:]
    if rest[:1] != ["-m"]:
        os.execv({python!r}, [{python!r}, *words[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2, os.open("/proc/self/ns/net", os.O_RDONLY)])
server.sendall(asked)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
code = int(server.makefile().readline() or 70)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Programs:
    """A folder of programs, which exists as long as this object."""

    def __init__(self) -> None:
        self._made = TemporaryDirectory(prefix="warm-")
        atexit.register(self._made.cleanup)
        self.folder = Path(self._made.name)
        self.python = self.folder / "python"
        address = str(self.folder / "socket")
        self.python.write_text(PROGRAM.format(python=str(BIN / "python"), address=address))
        self.python.chmod(0o755)
        for name in ("python3", *SCRIPTS):
            (self.folder / name).symlink_to(self.python)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of this process, with the programs first on PATH."""
        return {**os.environ, "PATH": f"{self.folder}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", **more}

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            header, files, _, _ = socket.recv_fds(client, 4, 4)
            asked = _exactly(client, int.from_bytes(header, "big"))
            forked = fork(_run, *json.loads(asked), str(self.python), Files(files))
            for file in files:
                os.close(file)
            threading.Thread(target=_hand_on, args=(client, forked), daemon=True).start()
            forked.join()
            with contextlib.suppress(OSError):  # the program was killed
                client.sendall(f"{forked.exitcode}\n".encode())


@functools.cache
def programs() -> Programs:
    """The programs of this process."""
    return Programs()


def _exactly(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        found += client.recv(size - len(found))
    return found


def _hand_on(client: socket.socket, forked: BaseProcess) -> None:
    """Forward signals to the fork; send SIGKILL if the program has ended."""
    while True:
        try:
            numbers = client.recv(16) or bytes([signal.SIGKILL])
        except OSError:
            return
        for number in numbers:
            if forked.pid is None or not forked.is_alive():
                return
            os.kill(forked.pid, number)


class Files:
    """Open files that are passed to a fork."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, tuple(DupFd(number) for number in self.numbers)


def _received(*files: Any) -> Files:
    return Files([file.detach() for file in files])


def _run(words: list[str], environment: dict[str, str], folder: str, python: str, files: Files) -> NoReturn:
    """Run the program in the fork until it exits."""
    *standard, network = files.numbers
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    if not os.path.sameopenfile(network, own) and ctypes.CDLL(None).setns(network, CLONE_NEWNET):
        raise OSError("the program's network cannot be joined")
    for number, file in enumerate(standard):
        os.dup2(file, number)
        os.close(file)
    os.close(network)
    os.close(own)
    sys.stdin = os.fdopen(0, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    # The variable names a parent that a fork does not have, so the launcher would seem to have ended.
    os.environ.update({name: value for name, value in environment.items() if name != LAUNCHER})
    sys.executable = python
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    code = 1
    try:
        code = _ended(words)
    finally:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _ended(words: list[str]) -> int:
    """Run the program. Returns its exit code."""
    name, *rest = words
    try:
        if Path(name).name in SCRIPTS:
            script = str(BIN / Path(name).name)
            sys.argv = [script, *rest]
            runpy.run_path(script, run_name="__main__")
        else:
            module, *given = rest[rest.index("-m") + 1 :]
            sys.argv = [module, *given]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        return 1
    return 0
