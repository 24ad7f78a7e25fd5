"""Options that cannot run on Ray, one line each. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from configs.choices import LauncherName
from configs.schema import Config
from slurm.options import check_environment, check_nodes

LEAST = 0.0001
BY_KEY = {
    "CPU": "set cluster.ray.cpus_per_node",
    "GPU": "set cluster.gpus_per_node",
    "memory": "Ray counts it, and does not limit the ranks; leave it out",
    "object_store_memory": "the ranks do not use the object store; leave it out",
}
"""Resources of Ray that this key does not accept, with the remedy for each."""


def check_options(config: Config) -> Iterator[str]:
    """One line for each option that Ray would not understand, or that would have another effect than meant."""
    options = config.cluster.ray
    if options.address is not None:
        yield from check_address(f"cluster.ray.address={options.address}", options.address)
    for name, amount in options.resources.items():
        key = f"cluster.ray.resources={{{name}: {amount:g}}}"
        if name in BY_KEY:
            yield f"{key}: is no further resource; {BY_KEY[name]}"
        elif not LEAST <= amount < float("inf"):
            yield f"{key}: must be at least {LEAST}, which is the least that Ray counts, and finite"
    yield from check_environment("cluster.ray.environment", options.environment)
    yield from check_nodes(config.cluster)
    if config.launcher.name is not LauncherName.torchrun:
        yield f"launcher.name={config.launcher.name}: Ray's nodes start their ranks with torchrun; leave it out"
    if config.launcher.master_port is not None:
        yield f"launcher.master_port={config.launcher.master_port}: the first node finds a free port; leave it out"


def check_address(key: str, address: str) -> Iterator[str]:
    """key: the key or variable that gives the address, with its value."""
    if "://" in address:
        yield (
            f"{key}: the program that looks after the run needs the run folder, and runs on a node of the cluster; give"
            " HOST:PORT there, or send the command with `ray job submit`"
        )
    elif address not in ("auto", "local") and not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", address):
        yield f"{key}: must be HOST:PORT, auto (the cluster of this machine) or local (a new one)"
