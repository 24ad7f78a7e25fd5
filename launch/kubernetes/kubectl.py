"""Checks through kubectl, before and at the submission: rights, volume, acceptance."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from configs.errors import EnvironmentProblem
from configs.schema import Config

SECONDS = 60
RESOURCE = "jobsets.jobset.x-k8s.io"
SHARED = "ReadWriteMany"
LOGGED = r"[EWIF]\d{4} |Warning: "


class Kubectl:
    """kubectl with this configuration's context and namespace. Raises EnvironmentProblem if it is not installed."""

    def __init__(self, config: Config) -> None:
        if shutil.which("kubectl") is None:
            raise EnvironmentProblem(
                "cluster=kubernetes: kubectl is not on the PATH; install it, or print the manifest with dry_run=true"
                " and create it elsewhere: kubectl create -f FILE"
            )
        self._config, options = config, config.cluster.kubernetes
        context = ["--context", options.context] if options.context is not None else []
        namespace = ["--namespace", options.namespace] if options.namespace is not None else []
        self._begin = ["kubectl", *context, *namespace]

    def check(self) -> None:
        """Raises EnvironmentProblem with everything that prevents this run's creation."""
        problems = [*self._rights()]
        problems += [] if problems else [*self._volume()]
        if problems:
            raise EnvironmentProblem(*problems)

    def create(self, manifest: str, name: str) -> None:
        """Submit. The server checks the whole manifest first, and creates nothing if it refuses any part."""
        for more in (["--dry-run=server"], []):
            done = self._run("create", "-f", "-", *more, given=manifest)
            if done.returncode:
                there = "(AlreadyExists)" in done.stderr
                delete = shlex.join([*self._begin, "delete", "jobset", name])
                remedy = f"; if that run is through, delete it, and submit again: {delete}" * there
                raise EnvironmentProblem(f"kubectl create: {_said(done)}{remedy}")

    def _rights(self) -> Iterator[str]:
        options = self._config.cluster.kubernetes
        where = f"cluster.kubernetes.namespace={options.namespace or 'null'}"
        done = self._run("auth", "can-i", "create", RESOURCE)
        # kubectl warns of an unknown type even if it reaches no server, and then gives no answer.
        answer = done.stdout.strip()
        if answer not in ("yes", "no"):
            yield (
                f"cluster=kubernetes: kubectl does not reach the cluster: {_said(done)}; name one of `kubectl config"
                " get-contexts` by cluster.kubernetes.context, or print the manifest with dry_run=true"
            )
        elif "doesn't have a resource type" in done.stderr:
            yield (
                f"cluster=kubernetes: this cluster does not know {RESOURCE}; install JobSet"
                " (https://jobset.sigs.k8s.io/docs/installation)"
            )
        elif answer == "no":
            yield f"{where}: you may not create {RESOURCE} there; ask for that right, or name another namespace"

    def _volume(self) -> Iterator[str]:
        name, nodes = self._config.cluster.kubernetes.volume, self._config.cluster.nodes
        done = self._run("get", "persistentvolumeclaim", str(name), "--output=json")
        key = f"cluster.kubernetes.volume={name}"
        if done.returncode:
            yield f"{key}: {_said(done)}; create a PersistentVolumeClaim of that name, or name another"
            return
        modes: list[str] = _found(done.stdout).get("spec", {}).get("accessModes", [])
        if nodes > 1 and SHARED not in modes:
            yield (
                f"{key}: is {', '.join(modes)}, and {nodes} nodes write to the run folder; name one that is {SHARED}"
            )

    def _run(self, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [*self._begin, *arguments]
        try:
            return subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise EnvironmentProblem(f"{' '.join(command)}: no answer in {SECONDS} seconds") from None


def _found(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """The first line of kubectl's complaint, which may follow lines of its own log."""
    lines = (done.stderr or done.stdout).strip().splitlines()
    messages = [line for line in lines if line.strip() and not re.match(LOGGED, line)] or lines
    line = messages[0] if messages else f"exit code {done.returncode}"
    return line.removeprefix("error: ").removeprefix("Error from server ").rstrip(".")[:300]
