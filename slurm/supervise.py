"""Runs on a job's first node, as its batch script: starts the ranks, and decides how to continue when they end.

    python -m slurm.supervise RUN_DIR

    a rank, an agent or srun dies      the whole step is started again, from the newest checkpoint, while that helps
    SIGUSR1 (the time limit is near,   the file STOP: the ranks save at the next step and end; the job goes back to
    or another job takes the nodes)    the queue
    SIGTERM (scancel, or too late)     Slurm sends it to the ranks too, which save if they can; nothing is started
    the node is lost                   Slurm requeues the job, and this program begins again elsewhere

Only this process receives signals: one that is sent to a whole step would also kill data loaders and launchers.
Standard library only, no torch. Exit code: 0 finished, 75 saved and stopped, else that of the ranks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from configs.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, CookbookError
from configs.output import guard_output
from slurm.arguments import hostfile
from slurm.job import folder, read_job, read_job_status, read_memory, write_memory, write_status
from trainer.process.status import FINISHED, LOCK, STOPPED, is_through
from trainer.process.stopping import STOP_FILE
from trainer.process.world import for_children
from trainer.run.restarts import Attempts, Decision, Standing, judge, read_standing

POLL_SECONDS = 0.2
PAUSE_SECONDS = 5.0  # recovery time for a lost node or a full disk; multiplied by the starts in vain
CONTROLLER_SECONDS = 60.0


class Supervisor:
    """One start of the job, from its first srun to its exit code."""

    def __init__(self, run_dir: Path, environment: Mapping[str, str] = os.environ) -> None:
        """Raises CookbookError if the run folder cannot be read."""
        self._dir, self._env = run_dir, environment
        self._job = read_job(run_dir)
        self._memory = read_memory(run_dir)
        self._signal: str | None = None
        self._ended = False
        self._hosts: list[str] = []

    def run(self) -> int:
        """Start the ranks until the run is finished, stopped, or given up. Returns the exit code."""
        (self._dir / STOP_FILE).unlink(missing_ok=True)  # of an earlier start, which was killed before it obeyed
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)
        if self._is_through(read_standing(self._dir).status):
            return self._leave(FINISHED, EXIT_FINISHED, "the run is finished")
        given_up = read_job_status(self._dir)
        if self._job.chain and given_up.get("state") == "failed":
            return self._leave("failed", EXIT_FAILED, str(given_up.get("reason")))
        if self._restart_count() > self._job.max_requeues:
            return self._leave("failed", EXIT_FAILED, self._cap_reached(read_standing(self._dir).step))
        self._hosts = host_names(self._env["SLURM_JOB_NODELIST"])
        (folder(self._dir) / "hostfile").write_text(hostfile(self._hosts, self._job.processes))
        while True:
            before = read_standing(self._dir)
            code = self._start(before)
            after = read_standing(self._dir)
            if after.status.get("state") == STOPPED and after.status != before.status:
                code = EXIT_STOPPED  # srun's is 0: see `agent.node_environment`
            verdict = self._judge(code, before, after)
            if after.status.get("state") == FINISHED and after.status != before.status:
                return self._leave(FINISHED, EXIT_FINISHED, verdict.reason)
            if self._signal is not None:
                return self._stop(self._signal, after.step)
            if code == EXIT_STOPPED:
                return self._leave_stopped(str(after.status.get("reason")), after.step)
            if not verdict.restart:
                word = after.status.get("exit_code") if after.status != before.status else None
                code = word if isinstance(word, int) and code else code
                return self._leave("failed", code, verdict.reason)
            self._say("restarting", verdict.reason, step=after.step)
            self._pause(PAUSE_SECONDS * (verdict.attempts.in_vain - 1))

    def _is_through(self, status: Mapping[str, object]) -> bool:
        """Whether the run is finished, and was not submitted again with more steps or epochs."""
        return is_through(status, steps=self._job.steps, epochs=self._job.epochs)

    def _start(self, before: Standing) -> int:
        """One srun, to its end. Returns its exit code, which is not conclusive: see `judge`."""
        self._wait_for_lock()
        if self._signal is not None:
            return EXIT_STOPPED
        self._memory.starts += 1
        write_memory(self._dir, self._memory)
        self._say("running", f"start {self._memory.starts} on {', '.join(self._hosts)}", step=before.step)
        step = subprocess.Popen(self._srun(), env=for_children(self._env))
        begun, announced, deadline = False, False, time.monotonic() + 60 * self._job.start_minutes
        while (code := step.poll()) is None:
            time.sleep(POLL_SECONDS)
            begun = begun or read_standing(self._dir).status != before.status
            if not begun and time.monotonic() > deadline:
                print(f"slurm: the ranks have not met after {self._job.start_minutes:g} minutes", flush=True)
                step.terminate()
                begun = True
            if self._signal is not None and not announced:
                # Before the ranks have ended: Slurm may kill this program too, KillWait seconds after its SIGTERM.
                reason = f"{self._signal} from Slurm; the ranks save and end"
                self._say("stopping", reason, step=read_standing(self._dir).step)
                announced = True
            if self._signal is not None and not begun:
                # Nothing is saved yet, and starting would use up the remaining time.
                step.terminate()
                begun = True
        return code if code >= 0 else 128 - code

    def _srun(self) -> list[str]:
        """--kill-on-bad-exit and --wait: without them a job lives on uselessly after one of its agents is gone."""
        job, cpus = self._job, self._env.get("SLURM_CPUS_PER_TASK")
        # srun no longer inherits it from sbatch (since 22.05).
        shares = [f"--cpus-per-task={cpus}"] if cpus else []
        tasks = [f"--nodes={job.nodes}", f"--ntasks={job.nodes}", "--ntasks-per-node=1"]
        arguments = [str(self._dir), self._address(), str(free_port()), str(self._memory.starts)]
        agent = [job.python, "-m", "slurm.agent", *arguments]
        return ["srun", *tasks, "--kill-on-bad-exit=1", "--wait=60", *shares, *job.srun, *agent]

    def _address(self) -> str:
        return "127.0.0.1" if self._job.nodes == 1 else self._hosts[0]

    def _judge(self, code: int, before: Standing, after: Standing) -> Decision:
        memory = self._memory
        attempts = Attempts(in_vain=memory.in_vain, step=memory.step)
        verdict = judge(code, before=before, after=after, attempts=attempts, max_restarts=self._job.max_restarts)
        memory.in_vain, memory.step = verdict.attempts.in_vain, verdict.attempts.step
        write_memory(self._dir, memory)
        return verdict

    def _stop(self, why: str, step: int) -> int:
        """The ranks ended because the job was asked to stop: requeue it, or end."""
        (self._dir / STOP_FILE).unlink(missing_ok=True)
        if why != "SIGUSR1":
            # scancel, or a lost node: both look the same from here, and only Slurm knows which it was.
            return self._leave_stopped(f"{why} from Slurm", step, unless="unless Slurm requeues the job itself, ")
        memory = self._memory
        memory.stops_in_vain = memory.stops_in_vain + 1 if step <= memory.stopped_at else 0
        memory.stopped_at = max(step, memory.stopped_at)
        write_memory(self._dir, memory)
        if memory.stops_in_vain >= max(1, self._job.max_restarts):
            reason = f"{memory.stops_in_vain} jobs in a row were stopped without a new checkpoint since step {step}"
            return self._leave("failed", EXIT_FAILED, f"{reason}; give a longer cluster.slurm.time")
        if self._job.chain:
            return self._leave("stopped", EXIT_STOPPED, f"step {step} is saved; the next job of the array goes on")
        if self._restart_count() >= self._job.max_requeues:
            return self._leave("failed", EXIT_FAILED, self._cap_reached(step))
        return self._requeue(step)

    def _requeue(self, step: int) -> int:
        job_id = self._env["SLURM_JOB_ID"]
        self._say("requeued", f"step {step} is saved; back to the queue", step=step)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's answer to the request
        deadline = time.monotonic() + CONTROLLER_SECONDS
        while True:
            try:
                done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, timeout=30)
                if done.returncode == 0:
                    break
                problem = done.stderr.strip()
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = str(error)
            if time.monotonic() > deadline:
                return self._leave_stopped(f"not requeued: {problem}", step)
            time.sleep(2)
        time.sleep(CONTROLLER_SECONDS)  # until Slurm ends this process
        return EXIT_STOPPED

    def _wait_for_lock(self) -> None:
        """On a node that was cut off, ranks of an earlier start may live until their collectives time out."""
        deadline, announced = time.monotonic() + 60 * self._job.stuck_minutes, False
        while is_locked(self._dir / LOCK) and self._signal is None and time.monotonic() < deadline:
            if not announced:
                print("slurm: waiting for the ranks of an earlier start to end", flush=True)
            announced = True
            time.sleep(1)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._signal is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name
        if number == signal.SIGUSR1:
            with contextlib.suppress(OSError):
                (self._dir / STOP_FILE).touch()

    def _restart_count(self) -> int:
        return int(self._env.get("SLURM_RESTART_COUNT", "0"))

    def _cap_reached(self, step: int) -> str:
        count = f"the job was requeued {self._restart_count()} times"
        return f"{count} (cluster.slurm.max_requeues={self._job.max_requeues}); {self._way_on(step)}"

    def _say(self, state: str, reason: str, *, step: int) -> None:
        print(f"slurm: {state}: {reason}", flush=True)
        write_status(
            self._dir,
            state,
            reason=reason,
            job=self._env.get("SLURM_JOB_ID"),
            nodes=self._hosts,
            starts=self._memory.starts,
            requeues=self._restart_count(),
            step=step,
        )

    def _leave_stopped(self, why: str, step: int, *, unless: str = "") -> int:
        return self._leave("stopped", EXIT_STOPPED, f"{why}; {self._way_on(step, unless=unless)}")

    def _way_on(self, step: int, *, unless: str = "") -> str:
        saved, verb = (f"step {step} is saved", "goes on") if step else ("no step is saved yet", "begins again")
        return f"{saved}; {unless}{verb} with: {self._job.goes_on}"

    def _leave(self, state: str, code: int, reason: str) -> int:
        self._say(state, reason, step=read_standing(self._dir).step)
        return code


def is_locked(lock: Path) -> bool:
    """Whether a living process holds the run folder (see `trainer.process.status.lock`)."""
    try:
        with open(lock, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def host_names(nodes: str) -> list[str]:
    """Slurm's short form of a list (n[1-3,7]) in full, in the order of SLURM_NODEID."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def ephemeral_ports() -> range:
    """Ports that the kernel gives to outgoing connections."""
    first, last = 32768, 60999
    with contextlib.suppress(OSError):
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return range(first, last + 1)


def free_port() -> int:
    """A free port of this node outside the kernel's range of ephemeral ports."""
    ephemeral = ephemeral_ports()
    ports = [port for port in range(10_000, 65_000) if port not in ephemeral]
    for port in random.sample(ports, k=len(ports)):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port
    raise CookbookError("no free port on this node outside the range that the kernel hands out")


def main(argv: Sequence[str]) -> int:
    """argv: the run folder."""
    guard_output()
    try:
        return Supervisor(Path(argv[0])).run()
    except CookbookError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
