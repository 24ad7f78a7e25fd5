"""The kinds of cluster that a run can start on, besides this machine: one module for each.

A module provides the attributes of `Elsewhere`. Kinds with a folder in the run folder add `status_lines` and `cancel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from configs.choices import ClusterKind
from configs.errors import EXIT_FINISHED, ConfigError, EnvironmentProblem
from configs.schema import Config


class Elsewhere(Protocol):
    """COMPARE: the command that replaces `python -m launch compare` there.
    WAITS: whether `launch_job` waits for the end of the run.
    KEEPS: path in the run folder that shows a run of this kind; None if there is none."""

    COMPARE: str
    WAITS: bool
    KEEPS: str | None

    def launch_job(self, config: Config, overrides: Sequence[str], *, config_dir: str | None) -> tuple[int, bool]:
        """Plan the run, and submit or supervise it. Returns the exit code, and whether a signal requested the end.

        Raises CookbookError before anything is submitted.
        """
        ...


class Controlled(Elsewhere, Protocol):
    def status_lines(self, run_dir: Path) -> list[str]: ...

    def cancel(self, run_dir: Path) -> str: ...


MODULES = {
    ClusterKind.slurm: "launch.jobs",
    ClusterKind.kubernetes: "launch.kubernetes.submit",
    ClusterKind.ray: "launch.ray.submit",
}
CONTROLS = ("status", "cancel")


def elsewhere(kind: ClusterKind) -> Elsewhere | None:
    """The module of that kind of cluster; None for this machine."""
    return cast(Elsewhere, import_module(MODULES[kind])) if kind in MODULES else None


def control(arguments: Sequence[str]) -> int:
    """`status RUN_DIR` or `cancel RUN_DIR`. Raises CookbookError if no run was submitted, or its cluster is gone."""
    if arguments[1:] in (["-h"], ["--help"]):
        print(f"python -m launch {arguments[0]} RUN_DIR")
        return EXIT_FINISHED
    if len(arguments) != 2:
        raise ConfigError(f"python -m launch {arguments[0]}: give the run folder, and nothing else")
    run_dir = Path(arguments[1]).expanduser().absolute()
    cluster = _cluster_of(run_dir)
    lines = cluster.status_lines(run_dir) if arguments[0] == "status" else [cluster.cancel(run_dir)]
    print(*lines, sep="\n")
    return EXIT_FINISHED


def _cluster_of(run_dir: Path) -> Controlled:
    """The cluster to which this run was last submitted."""
    modules = [cast(Controlled, elsewhere(kind)) for kind in MODULES]
    kept = {run_dir / module.KEEPS: module for module in modules if module.KEEPS is not None}
    there = [path for path in kept if path.exists()]
    if not there:
        raise EnvironmentProblem(f"{run_dir}: no job was submitted from this folder; give the run folder of one")
    return kept[max(there, key=lambda path: path.stat().st_mtime)]
