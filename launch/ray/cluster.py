"""The Ray cluster of a run: connect to it or start it, check its capacity, and hold a placement group in it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from configs.errors import EnvironmentProblem, first_line
from configs.packages import installed
from configs.schema import Config
from launch.ray.options import check_address
from trainer.plan.plan import Plan

ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.5
OBJECT_STORE_BYTES = 80 * 2**20  # for a cluster that is started here: close to Ray's minimum; the ranks do not use it
# Ray puts the working directory on its workers' search path. A user's may hold a folder `configs`.
ROOT = Path(__file__).parents[2]


class Cluster:
    """Context in which the run has its placement group. Raises EnvironmentProblem if the cluster is too small."""

    def __init__(self, config: Config, plan: Plan) -> None:
        self._config, self._plan = config, plan
        self.bundle = bundle(config, plan)
        self.address = ""
        self._connected = False
        self._handler: Any = None
        self._group: Any = None

    def __enter__(self) -> Self:
        if installed("ray") is None:
            raise EnvironmentProblem("cluster=ray: ray is not installed; pip install '.[ray]' here and on all nodes")
        import ray

        check_amounts(self._config.cluster.ray.resources)
        given = self._config.cluster.ray.address
        theirs = ray.is_initialized()  # a Python program that calls `cookbook.launch` may have its own connection
        if not theirs:
            self._connect()
        self.address = ray.get_runtime_context().gcs_address
        if theirs and given is not None and find_cluster(given) != self.address:
            raise EnvironmentProblem(
                f"cluster.ray.address={given}: this program is connected to the Ray cluster at {self.address}; leave"
                " the key out, or call ray.shutdown() first"
            )
        try:
            self._check()
            self._group = self._placed()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def wait(self, stop_requested: Callable[[], bool]) -> bool:
        """Wait until all bundles have a node, also after a node was lost. Returns False if asked to stop meanwhile.

        Raises EnvironmentProblem after `cluster.ray.start_minutes`.
        """
        limit, shown = self._config.cluster.ray.start_minutes, False
        deadline = time.monotonic() + 60 * limit
        while not self._group.wait(POLL_SECONDS):
            if stop_requested():
                return False
            if not shown:
                print(f"ray: waiting for {self.wanted()}", flush=True)
            shown = True
            if time.monotonic() > deadline:
                raise EnvironmentProblem(
                    f"cluster.ray.start_minutes={limit:g}: Ray has not had {self.wanted()} free in that time; `ray"
                    " status` shows who uses them; ask for fewer, or wait longer"
                )
        return True

    def actor(self, kind: type, node_rank: int) -> Any:
        """The handle of a new actor on a node of the run."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node_rank)
        further = {name: amount for name, amount in self.bundle.items() if name not in ("CPU", "GPU")}
        made = ray.remote(kind).options(  # pyright: ignore[reportAttributeAccessIssue]
            num_cpus=self.bundle["CPU"],
            num_gpus=self.bundle.get("GPU", 0),
            resources=further,
            scheduling_strategy=place,
            max_restarts=0,
        )
        return made.remote()

    def wanted(self) -> str:
        nodes = self._plan.nodes
        return f"{nodes} node{'s' * (nodes > 1)} with {resource_text(self.bundle)}"

    def _connect(self) -> None:
        import ray

        where = find_cluster(self._config.cluster.ray.address)
        begin: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
        if where is None:
            # Usage statistics are opt-in on this machine.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # CPU ranks may outnumber the cores, as without Ray.
            cpus = max(os.cpu_count() or 1, int(self.bundle["CPU"]))
            begin |= {"num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
        print(f"ray: {f'connecting to {where}' if where else 'starting a cluster on this machine'}", flush=True)
        self._handler = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.chdir(ROOT):
                ray.init(address=where or "local", **begin)
        except (Exception, SystemExit) as error:  # Ray also raises SIGTERM in this process
            what = "connect to" if where else "start"
            raise EnvironmentProblem(
                f"cluster.ray.address={where or 'local'}: cannot {what} a Ray cluster: {first_line(error)}"
            ) from None
        self._connected = True

    def _check(self) -> None:
        """Raises EnvironmentProblem if waiting cannot help."""
        import ray

        has: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = [each for each in has if all(each.get(name, 0) >= amount for name, amount in self.bundle.items())]
        if len(fit) >= self._plan.nodes or self._config.cluster.ray.autoscaling:
            return
        shown = "; ".join(resource_text({name: each.get(name, 0) for name in self.bundle}) for each in has)
        raise EnvironmentProblem(
            f"cluster.nodes={self._plan.nodes}: the run needs {self.wanted()}, and the nodes of this Ray cluster have:"
            f" {shown}; ask for less (cluster.nodes, cluster.gpus_per_node, cluster.ray.cpus_per_node), add nodes, or"
            " set cluster.ray.autoscaling=true where the cluster adds them itself"
        )

    def _placed(self) -> Any:
        from ray.util.placement_group import placement_group

        # One node of the plan is one machine: its ranks communicate faster than those of two.
        strategy = strategy_of(self._plan)
        return placement_group([dict(self.bundle) for _ in range(self._plan.nodes)], strategy=strategy)

    def _leave(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):
            if self._group is not None:
                remove_placement_group(self._group)
        if self._connected:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self._handler)  # Ray's handler ends the process


def find_cluster(address: str | None) -> str | None:
    """HOST:PORT of the running cluster, where `cluster.ray.address` points; None if a new one is to be started.

    Raises EnvironmentProblem if nothing answers there: Ray itself would retry for more than a minute.
    """
    from ray._private import services

    given = address
    key = f"cluster.ray.address={given or 'null'}"
    if given is None and os.environ.get(ADDRESS):
        given = os.environ[ADDRESS]
        key = f"{ADDRESS}={given}"
        if problems := [*check_address(key, given)]:
            raise EnvironmentProblem(*problems)
    hidden = os.environ.pop(ADDRESS, None)  # Ray would prefer it to `auto`
    try:
        found: str | None = services.canonicalize_bootstrap_address(given)  # pyright: ignore[reportArgumentType]
    except ConnectionError:
        raise EnvironmentProblem(
            f"{key}: no Ray cluster runs on this machine; start it with `ray start`, or give HOST:PORT"
        ) from None
    finally:
        if hidden is not None:
            os.environ[ADDRESS] = hidden
    if found is None:
        return None
    if given in (None, "auto"):
        key += f" ({found}, which was started on this machine)"
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EnvironmentProblem(
            f"{key}: no Ray cluster answers there ({why}); `ray status` on its head node says the address, `ray start"
            " --head` starts one, and cluster.ray.address=local one that ends with the run"
        ) from None
    return found


def check_amounts(resources: Mapping[str, float]) -> None:
    """Raises EnvironmentProblem, one line for each amount that Ray refuses, such as an odd share of a TPU. Ray itself
    would report it by a traceback, once nodes are free."""
    import ray

    problems: list[str] = []
    for name, amount in resources.items():
        try:
            ray.remote(Cluster).options(resources={name: amount})  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as error:
            problems.append(f"cluster.ray.resources={{{name}: {amount:g}}}: Ray refuses it ({first_line(error)})")
    if problems:
        raise EnvironmentProblem(*problems)


def bundle(config: Config, plan: Plan) -> dict[str, float]:
    """Resources of a node of the run: everything that its ranks need."""
    options = config.cluster.ray
    wanted: dict[str, float] = {"CPU": options.cpus_per_node or plan.gpus_per_node}
    if plan.device == "cuda":
        wanted["GPU"] = plan.gpus_per_node
    return {**wanted, **options.resources}


def strategy_of(plan: Plan) -> str:
    return "STRICT_SPREAD" if plan.nodes > 1 else "PACK"


def resource_text(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
