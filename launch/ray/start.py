"""One start of a run on Ray: an actor on each node, their output, and their end.

    a rank dies                    its launcher ends, the other nodes' are ended, and the start is over
    a node, or an actor, is lost   the same, when Ray has noticed it (its health checks take some 15 s)
    a signal                       SIGTERM for all ranks, which save and end; a second one ends them at once
    the file STOP                  rank 0 sees it, and all save and end

`launch.supervise` decides whether to start again.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EnvironmentProblem
from launch.command import Rendezvous
from launch.process import Forwarding, Outcome, Relay
from launch.ray.cluster import Cluster
from launch.ray.node import ERR, Node, Part, Said
from launch.ray.record import write_state
from slurm.supervise import is_locked
from trainer.process.status import LOCK
from trainer.process.stopping import STOP_FILE

POLL_SECONDS = 0.25
GRACE_SECONDS = 20.0  # for the ranks of other nodes to notice a death, and to report it
SILENT_SECONDS = 180.0  # for a node that Ray neither reaches nor declares dead


@dataclass(kw_only=True, slots=True)
class Running:
    """A node of this start. code: exit code of its launcher, once it has ended. lost: why the node is unreachable."""

    actor: Any
    address: str
    asked: Any = None
    answered: float = field(default_factory=time.monotonic)
    code: int | None = None
    lost: str | None = None

    @property
    def over(self) -> bool:
        return self.code is not None or self.lost is not None


@dataclass(kw_only=True, slots=True)
class Starter:
    """overrides: of the first start (False) and of a restart (True). stuck_minutes: how long ranks of an earlier
    start may still hold the run folder."""

    cluster: Cluster
    nodes: int
    overrides: Callable[[bool], list[str]]
    config_dir: str | None
    run_dir: Path
    environment: dict[str, str]
    stuck_minutes: float
    starts: int = 0

    def start(self, again: bool, signals: Forwarding) -> Outcome:
        """Start the ranks of all nodes, and wait for their end. Raises EnvironmentProblem if a node cannot."""
        requests: list[bool] = []
        signals.forward = lambda _number, before: requests.append(before)
        relay = Relay(sys.stderr)
        running: list[Running] = []
        try:
            write_state(self.run_dir, "waiting", reason=f"for {self.cluster.wanted()}", starts=self.starts)
            if not self._ready(lambda: bool(requests) or self._stop_file()):
                print("ray: asked to stop before the ranks were started", flush=True)
                return Outcome(code=EXIT_STOPPED, killed=None, to_stop=True, relay=relay, started=False)
            lost = self._begin(running, again)
            lost = lost or self._follow(running, requests, relay)
        finally:
            signals.forward = None
            _end_actors(running)
        code = next((node.code for node in running if node.code), EXIT_FAILED if lost else EXIT_FINISHED)
        code = 128 - code if code < 0 else relay.rank_code(code)
        return Outcome(code=code, killed=None, to_stop=signals.stop_requested, relay=relay, lost=lost)

    def _ready(self, stop_requested: Callable[[], bool]) -> bool:
        """Wait until the ranks of an earlier start are gone and the nodes are free. Returns False if asked to stop.

        A node that is cut off keeps its ranks until their collectives time out.
        """
        deadline, shown = time.monotonic() + 60 * self.stuck_minutes, False
        while is_locked(self.run_dir / LOCK) and time.monotonic() < deadline:
            if stop_requested():
                return False
            if not shown:
                print("ray: waiting for the ranks of an earlier start to end", flush=True)
            shown = True
            time.sleep(POLL_SECONDS)
        return self.cluster.wait(stop_requested) and not stop_requested()

    def _begin(self, running: list[Running], again: bool) -> str | None:
        """Start each node's ranks. Returns the reason if a node was lost meanwhile."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            running += [Running(actor=self.cluster.actor(Node, rank), address="?") for rank in range(self.nodes)]
            places: list[tuple[str, int]] = ray.get([node.actor.place.remote() for node in running])
            for node, (address, _) in zip(running, places, strict=True):
                node.address = address
            address, port = places[0]
            self.starts += 1
            token = f"{os.getpid()} {time.time_ns()}"
            where = f"start {self.starts} on {', '.join(node.address for node in running)}"
            print(f"ray: {where}", flush=True)
            write_state(self.run_dir, "running", reason=where, starts=self.starts, token=token)
            parts = [
                Part(
                    overrides=self.overrides(again),
                    config_dir=self.config_dir,
                    run_dir=str(self.run_dir),
                    token=token,
                    root=str(Path.cwd()),
                    environment=self.environment,
                    rendezvous=Rendezvous(address=address, port=port, node_rank=rank),
                )
                for rank in range(self.nodes)
            ]
            answers: list[list[str]] = ray.get(
                [node.actor.start.remote(part) for node, part in zip(running, parts, strict=True)]
            )
        except RayTaskError:  # an error in the actor's own code
            raise
        except RayError as error:
            if missing := re.search(r"ModuleNotFoundError: (.*)", str(error)):
                raise EnvironmentProblem(
                    f"cluster=ray: this project cannot be imported on the nodes ({missing[1]}); install it there with"
                    " the same version, pip install '.[ray]'"
                ) from None
            return f"a node was lost: {_why(error)}"
        if problems := dict.fromkeys(problem for answer in answers for problem in answer):
            raise EnvironmentProblem(*problems)
        for node in running:
            node.answered = time.monotonic()
        return None

    def _follow(self, running: list[Running], requests: list[bool], relay: Relay) -> str | None:
        """Show the nodes' output until all have ended. Returns the reason of the first loss."""
        lost: str | None = None
        deadline: float | None = None
        while not all(node.over for node in running):
            while requests:
                _signal_nodes(running, again=requests.pop(0))
            for node in running:
                if not node.over and (said := _answer(node)) is not None:
                    _show(said, relay)
                    node.code = said.code
                if lost is None and (node.lost or deadline != float("inf")):  # later we end launchers ourselves
                    lost = _lost(node)
            if deadline is None and any(node.lost or node.code for node in running):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                _signal_nodes(running, again=True)
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        relay.end()
        return lost

    def _stop_file(self) -> bool:
        if not os.path.exists(self.run_dir / STOP_FILE):
            return False
        (self.run_dir / STOP_FILE).unlink(missing_ok=True)
        return True


def _lost(node: Running) -> str | None:
    """The fate of a node whose ranks lost their actor or launcher: they save and report that they were stopped,
    although nobody wanted the run to end."""
    if node.lost is not None:
        return f"node {node.address} was lost: {node.lost}"
    if node.code is not None and node.code < 0:
        return f"the launcher on node {node.address} was killed by {signal.Signals(-node.code).name}"
    return None


def _answer(node: Running) -> Said | None:
    """A node's new output; None if it does not answer now."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

    node.asked = node.asked or node.actor.poll.remote()
    ready, _ = ray.wait([node.asked], timeout=POLL_SECONDS)
    silent = time.monotonic() - node.answered > SILENT_SECONDS
    if not ready:
        node.lost = f"it has not answered for {SILENT_SECONDS:g} s" if silent else None
        return None
    asked, node.asked = node.asked, None
    try:
        said: Said = ray.get(asked)
    except ActorUnavailableError as error:  # temporary; Ray finds out whether the node is alive
        node.lost = _why(error) if silent else None
        return None
    except RayTaskError:  # an error in the actor's own code
        raise
    except RayError as error:  # killed by Ray's memory monitor, or gone with an unread answer
        node.lost = _why(error)
        return None
    node.answered = time.monotonic()
    return said


def _show(said: Said, relay: Relay) -> None:
    for stream, line in said.lines:
        if stream == ERR:
            relay.add(line)
        else:
            sys.stdout.write(line)
    sys.stdout.flush()


def _signal_nodes(running: list[Running], *, again: bool) -> None:
    for node in running:
        if not node.over:
            (node.actor.end if again else node.actor.stop).remote()


def _end_actors(running: list[Running]) -> None:
    """Return the bundles. Everything that an actor has started ends with it."""
    import ray

    ending = [node.actor.end.remote() for node in running if not node.over]
    with contextlib.suppress(Exception):
        ray.wait(ending, num_returns=len(ending), timeout=GRACE_SECONDS) if ending else None
    for node in running:
        with contextlib.suppress(Exception):
            ray.kill(node.actor)


def _why(error: Exception) -> str:
    """The clause of Ray's page about an actor's end that gives the reason."""
    text = " ".join(str(error).split())
    found = re.search(r"because (.*?)(\.\s|\.$| Node Id| NodeId|$)", text)
    return (found[1] if found else text)[:300]
