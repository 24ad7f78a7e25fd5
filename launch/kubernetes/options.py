"""Options that cannot become a JobSet, one line each. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from posixpath import normpath

from configs.choices import LauncherName
from configs.schema import Config
from launch.kubernetes.manifest import INDEX
from slurm.options import check_environment, check_nodes

LABEL = r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?"  # RFC 1123, for names of objects
QUANTITY = r"(?=.*[1-9])\d+(\.\d+)?([KMGT]i?)?"
NAMES = ("volume", "namespace", "queue", "service_account")
QUANTITIES = ("memory", "shared_memory")
ADDRESSES = ("image", "gpu_resource")
OURS = {
    "containers": "set cluster.kubernetes.image, environment, secrets, cpus and memory",
    "volumes": "the run's own are there, and cluster.kubernetes.volume names the one for its folder",
    "restartPolicy": "launcher.max_restarts says how often all pods are started again",
    "terminationGracePeriodSeconds": "set cluster.kubernetes.grace_seconds",
    "serviceAccountName": "set cluster.kubernetes.service_account",
}
"""Fields of a pod that the run depends on, with the remedy for each."""


def check_options(config: Config, run_dir: PurePosixPath) -> Iterator[str]:
    """One line for each option that the cluster would not understand, or that would have another effect than meant."""
    options = config.cluster.kubernetes
    if options.image is None:
        yield (
            "cluster.kubernetes.image=null: the pods need an image in which this project is installed; build one with"
            " launch/kubernetes/Dockerfile, and name it"
        )
    if options.volume is None:
        yield (
            "cluster.kubernetes.volume=null: what the run writes would end with its pods; name a PersistentVolumeClaim"
        )
    for key in NAMES:
        value = getattr(options, key)
        if value is not None and not re.fullmatch(LABEL, value):
            yield f"cluster.kubernetes.{key}={value}: no name of Kubernetes; use a-z, 0-9, - and ."
    for name in options.secrets:
        if not re.fullmatch(LABEL, name):
            yield f"cluster.kubernetes.secrets=[{name}]: no name of Kubernetes; use a-z, 0-9, - and ."
    for key in QUANTITIES:
        value = getattr(options, key)
        if value is not None and not re.fullmatch(QUANTITY, value):
            yield f"cluster.kubernetes.{key}={value}: no amount of memory; write 64Gi"
    for key in ADDRESSES:
        value = getattr(options, key)
        if value is not None and re.search(r"\s", value):
            yield f"cluster.kubernetes.{key}={value}: must not hold a space"
    for name in OURS:
        if name in options.pod:
            yield f"cluster.kubernetes.pod={{{name}: ...}}: is written by this project; {OURS[name]}"
    yield from check_environment("cluster.kubernetes.environment", options.environment, taken=(INDEX,))
    mount = PurePosixPath(options.mount)
    if not mount.is_absolute() or mount == PurePosixPath("/"):
        yield f"cluster.kubernetes.mount={options.mount}: must be an absolute path below /"
    elif mount not in PurePosixPath(normpath(run_dir)).parents:
        yield f"train.run_dir={run_dir}: would end with its pod; choose a folder below cluster.kubernetes.mount={mount}"
    yield from check_nodes(config.cluster)
    if config.launcher.name is not LauncherName.torchrun:
        yield f"launcher.name={config.launcher.name}: pods start their ranks with torchrun; leave it out"
    if config.launcher.master_port is not None:
        yield f"launcher.master_port={config.launcher.master_port}: use cluster.kubernetes.port"
    if config.train.resume == "never":
        yield "train.resume=never: pods are started again with the same overrides, and go on then; leave it out"
