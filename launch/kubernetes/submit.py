"""Plan a run for a Kubernetes cluster and submit it, or print what would be submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from itertools import count
from pathlib import PurePosixPath

import yaml

from configs.errors import EXIT_FINISHED, ConfigError
from configs.overrides import quote_value
from configs.schema import Config
from launch.kubernetes.kubectl import Kubectl
from launch.kubernetes.manifest import LONGEST_NAME, NODE, jobset, jobset_name
from launch.kubernetes.options import check_options
from trainer.estimate.gate import check_memory
from trainer.make_plan import make_plan
from trainer.plan.machine import Machine
from trainer.report.folder import run_label

COMPARE = "submit them with python -m launch -m ..., then python -m launch compare FOLDER where the volume is mounted"
WAITS = False
KEEPS = None  # kubectl knows the state of a JobSet
_taken: set[str] = set()


def launch_job(config: Config, overrides: Sequence[str], *, config_dir: str | None) -> tuple[int, bool]:
    """Plan one run and submit it. Raises CookbookError before anything is submitted."""
    options, name = config.cluster.kubernetes, _name(config)
    run_dir = PurePosixPath(config.train.run_dir or f"{options.mount}/{name}")
    problems = [*check_options(config, run_dir)]
    if config_dir is not None and PurePosixPath(options.mount) not in PurePosixPath(config_dir).parents:
        problems.append(
            f"--config-dir {config_dir}: the pods do not see this folder; put it on the volume, below"
            f" cluster.kubernetes.mount={options.mount}"
        )
    if problems:
        raise ConfigError(*problems)
    plan = make_plan(config, Machine(gpus=config.cluster.gpus_per_node or 0))
    memory = check_memory(config, plan)
    passed_on = [word for word in overrides if not word.startswith("dry_run=")]
    if not any(word.startswith("train.run_dir=") and "${" not in word for word in passed_on):
        # Pods have their own environment, where a variable could name another folder.
        passed_on.append(f"train.run_dir={quote_value(str(run_dir))}")
    passed_on += ["--config-dir", config_dir] if config_dir is not None else []
    manifest = yaml.safe_dump(jobset(config, plan, passed_on, name=name), sort_keys=False, width=120)
    lines = [*plan.describe().splitlines(), *memory]
    if config.dry_run:  # the whole output is a file for kubectl
        print(*(f"# {line}".rstrip() for line in lines), "---", manifest, sep="\n", end="", flush=True)
        return EXIT_FINISHED, False
    kubectl = Kubectl(config)
    kubectl.check()
    kubectl.create(manifest, name)
    where = f" -n {options.namespace}" if options.namespace else ""
    print(*lines, "", sep="\n")
    print(f"submitted  JobSet {name}")
    print(f"folder     {run_dir} on the volume {options.volume}")
    print(f"follow     kubectl{where} logs -f job/{name}-{NODE}-0")
    print(f"status     kubectl{where} get jobset {name}")
    print(f"cancel     kubectl{where} delete jobset {name}    (the ranks save first)")
    print(f"the pods   python -m launch.kubernetes.node {shlex.join(passed_on)}", flush=True)
    return EXIT_FINISHED, False


def _name(config: Config) -> str:
    """The JobSet's name: the run folder's, or the run's with the time. Points of a sweep get different names."""
    stamp = datetime.now().strftime("%m%d-%H%M%S")
    if config.train.run_dir is not None:
        folder, mount = PurePosixPath(config.train.run_dir), PurePosixPath(config.cluster.kubernetes.mount)
        below = str(folder.relative_to(mount)) if mount in folder.parents else folder.name
        return jobset_name(below if len(below) <= LONGEST_NAME else folder.name)
    # The end of a long name is cut off, so the time comes first.
    stamps = (stamp if number == 1 else f"{stamp}-{number}" for number in count(1))
    names = (jobset_name(f"run-{stamp}-{run_label(config)}") for stamp in stamps)
    name = next(name for name in names if name not in _taken)
    _taken.add(name)
    return name
